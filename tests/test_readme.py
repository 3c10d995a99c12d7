"""The README's lines work as they stand."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_first_six_lines_work_and_give_the_shapes_they_say(tmp_path, monkeypatch, picture):
    assert len([line for line in BLOCKS[0].splitlines() if line]) <= 6
    picture(90, 70).save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(BLOCKS[0], names)
    assert (tmp_path / "reconstruction.png").is_file()
    for name in ("images", "tokens"):
        shape = re.search(rf"^{name} = .*# (\([\d, ]+\))", BLOCKS[0], flags=re.MULTILINE)[1]
        assert str(tuple(names[name].shape)) == shape


def test_the_other_lines_work():
    names = {"images": torch.zeros(1, 3, 256, 256)}
    with torch.no_grad():
        exec(BLOCKS[1], names)
    assert names["out"].reconstruction.shape == (1, 3, 256, 256)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", README))))
def test_links_to_files_and_headings_lead_somewhere(link):
    file, _, heading = link.partition("#")
    assert (ROOT / file).exists()
    if heading:
        headings = re.findall(r"^#+ (.*)$", README if not file else (ROOT / file).read_text(), flags=re.MULTILINE)
        assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}
