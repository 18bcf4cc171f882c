#!/usr/bin/env bash
# The tests with the lowest and the newest torch that sublens allows, each in an environment of its own; not part of CI.
#
#   bash benchmarks/torch_versions.sh [VERSION ...] [-- pytest arguments]
#
# Without versions: the lower bound in pyproject.toml, and the newest that pip finds. Results belong in docs/supported.md.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

versions=()
while [[ $# -gt 0 && "$1" != -- ]]; do versions+=("$1"); shift; done
[[ "${1:-}" == -- ]] && shift
if [[ ${#versions[@]} -eq 0 ]]; then
    lowest=$(sed -n 's/^ *"torch>=\([0-9.]*\),.*/\1/p' pyproject.toml)
    newest=$(python3 -m pip index versions torch 2>/dev/null | sed -n 's/^torch (\([0-9.]*\)).*/\1/p')
    versions=("$lowest" ${newest:+"$newest"})
fi

failed=0
for version in "${versions[@]}"; do
    environment=$(mktemp -d)
    python3 -m venv "$environment"
    # Everything but torch, and what torch itself asks for, as pinned; pip finds the newest fitting of those.
    grep -vE '^(torch|fsspec|filelock|networkx|setuptools|sympy|mpmath|typing_extensions)==' constraints.txt > "$environment/constraints.txt"
    if "$environment/bin/python" -m pip install -q -c "$environment/constraints.txt" "torch==$version" '.[test]'; then
        "$environment/bin/python" -m pytest -q "$@" || failed=1
    else
        failed=1
    fi
    "$environment/bin/python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)'
    rm -rf "$environment"
done
exit "$failed"
