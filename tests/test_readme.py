"""The README is true: its commands are those that are run, its code runs, and its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sublens import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)( [\w.]+)?\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def blocks(language: str, name: str = "") -> list[str]:
    return [text for found, label, text in BLOCKS if (found, label.strip()) == (language, name)]


def test_the_two_commands_come_first_and_ci_runs_the_second():
    run, test = blocks("sh")
    assert README.startswith("# sublens\n\n```sh\n" + run)
    assert run == "python -m pip install -c constraints.txt . && sublens inspect add-mul\n"
    assert f"\n{test}" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_code_runs(tmp_path):
    # What is shown must be worth seeing: masks that have shed weights, and a subnetwork that still answers.
    checks = "assert run.mask.kept < 0.5 > other.kept, (run.mask.kept, other.kept)\n"
    checks += "assert (pruned(x).argmax(dim=1) == y).float().mean() > 0.8\n"
    program = "torch.manual_seed(0)\n".join(["import torch\n", "\n".join([*blocks("python"), checks])])
    ended = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "task.safetensors").exists()


def test_the_study_runs(tmp_path, monkeypatch, capsys):
    (text,) = blocks("python", "study.py")
    assert text.count("\n") <= 40
    assert "network_steps=2000, mask_steps=2000" in text
    short = text.replace("network_steps=2000", "network_steps=20").replace("mask_steps=2000", "mask_steps=20")
    (tmp_path / "study.py").write_text(short, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert cli.run(["inspect", "study.py"]) == 0
    assert "greater mask" in capsys.readouterr().out
    folder = tmp_path / "runs" / "two-questions-seed0"
    for named in re.findall(r"^\| `([\w./]+)`", README, re.MULTILINE):
        assert (folder / named.replace("NAME", "greater")).exists(), named


@pytest.mark.parametrize("link", re.findall(r"\]\(((?!https://)[^)]+)\)", README))
def test_links_lead_to_files(link):
    assert (ROOT / link).is_file()
