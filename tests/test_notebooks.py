"""The notebooks run from top to bottom, and what is stored in them is the output of such a run."""

import getpass
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
NAMES = ("01_tokenize_and_reconstruct.ipynb", "02_train_a_token_model.ipynb")
LARGEST_BYTES = 400_000
# Few enough for seconds on one core; three crops held out, which the notebook shows.
QUICK = {"steps": 8, "crops_per_photograph": 24, "samples_per_class": 1}


def read(name):
    return nbformat.read(NOTEBOOKS / name, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def text(notebook):
    """All that was printed."""
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def pictures(notebook):
    """For each cell with pictures, how many."""
    shown = [
        sum("image/png" in each.get("data", {}) or "image/jpeg" in each.get("data", {}) for each in cell.outputs)
        for cell in code_cells(notebook)
    ]
    return [count for count in shown if count]


def held_out_losses(notebook):
    return [float(number) for number in re.findall(r"held out (\d+\.\d+)", text(notebook))]


def parameters_cell(notebook):
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    return cell


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Runs a notebook in an empty folder by this very Python; a cell that fails raises."""
    for variable in ("HF_HOME", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "work"
    folder.mkdir()

    def run(notebook):
        client = NotebookClient(
            notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        return client.execute()

    return run


def test_the_first_notebook_runs_and_gives_what_is_stored_in_it(execute):
    stored = read(NAMES[0])
    done = execute(read(NAMES[0]))
    assert pictures(done) == pictures(stored) == [1] * 4
    assert "tokens (2, 16, 16) torch.int64 from 0 to 1023" in text(done)
    # Of how far a change reaches, which its words tell; another processor may round a token differently.
    reach, told = (re.findall(r"(\d+)% of the whole change", text(each)) for each in (done, stored))
    assert [int(share) for share in reach] == pytest.approx([int(share) for share in told], abs=3)


def test_the_second_notebook_runs_and_its_model_learns(execute):
    """With the numbers of its first code cell, tagged `parameters`, replaced: all of its training takes minutes."""
    notebook = read(NAMES[1])
    cell = parameters_cell(notebook)
    assert set(re.findall(r"^(\w+) = ", cell.source, flags=re.MULTILINE)) == set(QUICK)
    cell.source = "\n".join(f"{name} = {value}" for name, value in QUICK.items())
    done = execute(notebook)
    losses = held_out_losses(done)
    assert losses[-1] < losses[0]
    assert "240 sequences to train on, 15 held out" in text(done)  # of five photographs; training has mirror images
    assert pictures(done) == pictures(read(NAMES[1]))


def test_the_second_notebook_as_stored_has_learned_more_than_which_codes_each_class_has():
    stored = read(NAMES[1])
    assert parameters_cell(stored) is code_cells(stored)[0]
    losses = held_out_losses(stored)
    frequencies = float(re.search(r"(\d+\.\d+) from how often each code occurs in the class", text(stored))[1])
    assert losses[-1] < frequencies - 0.5 < losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_stored_outputs_are_of_one_complete_run(name):
    cells = code_cells(read(name))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output.output_type for cell in cells for output in cell.outputs}
    assert kinds <= {"stream", "display_data", "execute_result"}


@pytest.mark.parametrize("name", NAMES)
def test_stored_notebooks_are_small_and_tell_nothing_of_the_machine(name):
    raw = (NOTEBOOKS / name).read_text()
    assert len(raw.encode()) < LARGEST_BYTES
    notebook = read(name)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert {output.get("name", "stdout") for output in outputs(notebook)} == {"stdout"}  # nothing on standard error
    for output in outputs(notebook):
        output.get("data", {}).pop("image/png", None)
        output.get("data", {}).pop("image/jpeg", None)
    words = nbformat.writes(notebook)
    assert "application/vnd.jupyter" not in words
    assert "\\u001b" not in words  # colours and progress bars of a terminal
    assert not re.search(r"(?<![\w.])/(tmp|work|root|home|Users|opt|usr)\b", words)
    user = getpass.getuser()
    assert user == "root" or not re.search(rf"\b{re.escape(user)}\b", words)
