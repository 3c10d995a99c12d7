"""Pickled checkpoints are read for their tensors: nothing in them runs, and what is damaged is refused."""

import builtins
import collections
import os
import subprocess
import sys
import types
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from vqhit.pickles import read_state_dict

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}


def save(path, content, zipped=True):
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def assert_read(path, key="state_dict"):
    found = read_state_dict(path, key)
    assert found.keys() == WEIGHTS.keys()
    for name, tensor in WEIGHTS.items():
        assert type(found[name]) is torch.Tensor
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


class Calls:
    """Pickled as a call, and a state set on what it returns."""

    def __init__(self, function, *arguments, **state):
        self.call = (function, arguments, state) if state else (function, arguments)

    def __reduce__(self):
        return self.call

    def __call__(self):
        raise AssertionError("only pickled")


class Touches:
    """Makes a file when it is made, or given its state."""

    def __new__(cls, marker):
        open(marker, "w").close()  # noqa: PTH123
        return super().__new__(cls)

    def __reduce__(self):
        return Touches, (self.marker,), {"marker": self.marker}

    def __setstate__(self, state):
        open(state["marker"], "w").close()  # noqa: PTH123


def touches(marker):
    made = object.__new__(Touches)
    made.marker = marker
    return made


ATTACKS = {
    "eval": lambda marker: Calls(builtins.eval, f"open({marker!r}, 'w')"),
    "exec": lambda marker: Calls(builtins.exec, f"open({marker!r}, 'w')"),
    "open": lambda marker: Calls(builtins.open, marker, "w"),
    "getattr": lambda marker: Calls(Calls(getattr, Calls(__import__, "os"), "mknod"), marker),
    "subprocess": lambda marker: Calls(subprocess.check_call, ["touch", marker]),
    "torch.save": lambda marker: Calls(torch.save, 1, marker),
    "torch.hub": lambda marker: Calls(torch.hub.download_url_to_file, "file:///etc/hostname", marker),
    "a class": touches,
    "os.system": lambda marker: Calls(os.system, f"touch {marker}"),
    "os.mkdir": lambda marker: Calls(os.mkdir, marker),
}


@FORMATS
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_file_is_called(tmp_path, zipped, attack):
    marker = tmp_path / "marker"
    harmful = ATTACKS[attack](str(marker))
    path = save(tmp_path / "a.ckpt", {"callbacks": [harmful], "state_dict": WEIGHTS}, zipped)
    if message := {"os": "GLOBAL .* blocked", "getattr": "unrecognized function"}.get(attack.split(".")[0]):
        with pytest.raises(ValueError, match=rf"a.ckpt: not a file of .* unsafe \(.*{message}"):
            read_state_dict(path, "state_dict")
    else:
        assert_read(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists(), "the attack does nothing anywhere"


@FORMATS
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_the_place_of_weights_is_called(tmp_path, zipped, attack):
    marker = tmp_path / "marker"
    harmful = ATTACKS[attack](str(marker))
    for content in (
        {"state_dict": WEIGHTS | {"b": harmful}},
        {"state_dict": harmful},
        {"state_dict": collections.OrderedDict(a=harmful)},
        harmful,
    ):
        with pytest.raises(ValueError, match=r"a\.ckpt: "):
            read_state_dict(save(tmp_path / "a.ckpt", content, zipped), "state_dict", bare=True)
    assert not marker.exists()


def test_what_this_process_allows_is_not_called_either_and_stays_allowed(tmp_path):
    path = save(tmp_path / "a.ckpt", {"callbacks": touches(str(tmp_path / "marker")), "state_dict": WEIGHTS})
    before = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([Touches]):
        allowed = torch.serialization.get_safe_globals()
        assert_read(path)
        assert set(torch.serialization.get_safe_globals()) == set(allowed)
        assert not (tmp_path / "marker").exists()
        torch.load(path, weights_only=True)
        assert (tmp_path / "marker").exists()
    assert set(torch.serialization.get_safe_globals()) == set(before)


@FORMATS
def test_the_environment_cannot_ask_for_more(tmp_path, monkeypatch, zipped):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    marker = tmp_path / "marker"
    content = {"callbacks": touches(str(marker)), "state_dict": WEIGHTS}
    path = save(tmp_path / "a.ckpt", content, zipped)
    assert_read(path)
    assert not marker.exists()
    with pytest.warns(UserWarning, match="TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        torch.load(path)
    assert marker.exists()


@FORMATS
@pytest.mark.parametrize("name", ["Thing", "part"])
def test_no_module_of_a_file_is_imported(tmp_path, monkeypatch, zipped, name):
    """Neither that of a foreign class nor one whose name passes for a class: both would leave a file behind."""
    marker, folder = tmp_path / "marker", tmp_path / "foreign"
    folder.mkdir()
    touch = f"open({str(marker)!r}, 'w').close()\n"
    (folder / "__init__.py").write_text(f"{touch}class Thing: pass\n")
    (folder / "part.py").write_text(touch)
    module = types.ModuleType("foreign")
    thing = type(name, (), {"__module__": "foreign", "__qualname__": name})
    setattr(module, name, thing)
    monkeypatch.setitem(sys.modules, "foreign", module)
    instance = thing()
    instance.best = 0.5
    path = save(tmp_path / "a.ckpt", {"callbacks": {thing: [instance]}, "state_dict": WEIGHTS}, zipped)
    monkeypatch.delitem(sys.modules, "foreign")
    monkeypatch.syspath_prepend(tmp_path)
    assert_read(path)
    assert not marker.exists()
    assert not {"foreign", "foreign.part"} & sys.modules.keys()
    __import__("foreign.part")
    assert marker.exists()
    for imported in ("foreign", "foreign.part"):
        del sys.modules[imported]


def test_attributes_set_by_a_file_change_nothing(tmp_path):
    weight = WEIGHTS["a.weight"].clone()
    weight.copy_ = weight.isfinite = Calls(dict)
    pairs = list((WEIGHTS | {"a.weight": weight}).items())
    state = Calls(collections.OrderedDict, pairs, items=Calls(dict), keys=Calls(dict))
    path = save(tmp_path / "a.ckpt", {"state_dict": state})
    assert_read(path)
    assert not vars(read_state_dict(path, "state_dict")["a.weight"])
    assert vars(torch.load(path, weights_only=False)["state_dict"]).keys() == {"items", "keys"}


@FORMATS
def test_parameters_and_python_2s_names_are_read(tmp_path, zipped):
    state = {name: torch.nn.Parameter(tensor) for name, tensor in WEIGHTS.items()}
    assert_read(save(tmp_path / "a.ckpt", {"model": state, "kinds": [dict, range, complex]}, zipped), key="model")


def test_a_bare_state_dict_is_read_only_where_it_may_be(tmp_path):
    path = save(tmp_path / "a.ckpt", WEIGHTS)
    assert read_state_dict(path, "state_dict", bare=True).keys() == WEIGHTS.keys()
    with pytest.raises(ValueError, match=r"a.ckpt: no state dict under 'model'; there is: 'a.weight', 'a.bias'"):
        read_state_dict(path, "model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "its content is of class list; expected a dictionary with 'state_dict'"),
        ({}, "no state dict under 'state_dict'; there is: nothing"),
        ({"state_dict": 1, "model": {}}, "no state dict under 'state_dict'; there is: 'state_dict', 'model'"),
        ({"state_dict": {1: torch.ones(1)}}, "a key of its state dict is no text, but of class int"),
        ({"state_dict": {"a": [torch.ones(1)]}}, "a is no tensor, but of class list"),
        ({"state_dict": {"a": Calls(range, 3)}}, "a is no tensor, but of class OrderedDict"),
        ({"state_dict": {"a": torch.eye(2).to_sparse()}}, "tensor a is sparse, quantized, or larger than its data"),
        ({"state_dict": {"a": torch.ones(1).expand(9)}}, "tensor a is sparse, quantized, or larger than its data"),
        ({"state_dict": {"a": torch.ones(3, device="meta")}}, "tensor a is sparse, quantized, or larger than its data"),
    ],
)
def test_other_content_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"a\.ckpt: .*{message}"):
        read_state_dict(save(tmp_path / "a.ckpt", content), "state_dict", bare=True)


def assert_refused(path, message):
    with pytest.raises(ValueError, match=message) as error:
        read_state_dict(path, "state_dict", bare=True)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + len(str(path))


@FORMATS
def test_dictionaries_of_a_class_of_their_own_do_no_harm(tmp_path, zipped):
    beside = {"hparams": collections.defaultdict(list, a=[1]), "args": collections.Counter("abc")}
    assert_read(save(tmp_path / "a.ckpt", {**beside, "state_dict": WEIGHTS}, zipped))


def test_compressed_records_are_refused(tmp_path):
    """torch would take their compressed bytes for numbers where it leaves tensors on disk."""
    source = save(tmp_path / "a.ckpt", {"state_dict": WEIGHTS})
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(tmp_path / "b.ckpt", "w", zipfile.ZIP_DEFLATED) as after:
        for record in before.infolist():
            after.writestr(record.filename, before.read(record))
    assert_refused(tmp_path / "b.ckpt", "is compressed")


_BEGINNING = b"\x80\x02}X\x0a\x00\x00\x00state_dict"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (_BEGINNING + b"})" + b"\x85" * 300_000 + b"X\x01\x00\x00\x00xss.", "nested too deep"),
        (_BEGINNING + b"cbuiltins\nbytearray\n\x8a\x05\x00\xc8\x17\xa8\x04\x85Rs.", "it calls builtins.bytearray"),
    ],
)
def test_what_would_exhaust_the_process_is_refused(tmp_path, program, message):
    source = save(tmp_path / "a.ckpt", {"state_dict": WEIGHTS})
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(tmp_path / "b.ckpt", "w") as after:
        for record in before.infolist():
            content = program if record.filename.endswith("data.pkl") else before.read(record)
            after.writestr(record.filename, content)
    assert_refused(tmp_path / "b.ckpt", message)


@FORMATS
def test_a_truncated_file_is_refused(tmp_path, zipped):
    path = save(tmp_path / "a.ckpt", {"state_dict": WEIGHTS}, zipped)
    whole = path.read_bytes()
    for size in {0, 1, 4, 30, *range(len(whole) // 8, len(whole) - 1, len(whole) // 8), len(whole) - 1}:
        path.write_bytes(whole[:size])
        assert_refused(path, "not a file of torch.save, damaged, or unsafe")


def test_a_changed_byte_among_the_weights_is_found(tmp_path):
    path = save(tmp_path / "a.ckpt", {"state_dict": WEIGHTS})
    data = bytearray(path.read_bytes())
    data[data.find(WEIGHTS["a.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    assert_refused(path, "record .*data/0 has another CRC")


def test_a_file_written_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / "a.ckpt", {"state_dict": WEIGHTS})
    finally:
        torch.serialization.set_crc32_options(True)
    assert_read(path)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit
def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "text").write_text("<html>not here</html>\n" * 100)
    (tmp_path / "pickle").write_bytes(b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00}\x94.")
    save_file({"a": torch.ones(2)}, tmp_path / "safetensors")
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("notes.txt", "no pickle")
    torch.jit.save(torch.jit.script(torch.nn.Identity()), tmp_path / "script")
    for path in list(tmp_path.iterdir()):
        assert_refused(path, "not a file of torch.save, damaged, or unsafe")
    assert_refused(tmp_path, "a folder; expected a file")
    assert_refused(tmp_path / "absent", "no such file; expected a file")
