"""What is there is named with its place, what is not with its fix."""

import contextlib
import http.server
import json
import threading

import pytest

from tests.inception import known_as_published
from vqhit import doctor
from vqhit.extractors import INCEPTION


@pytest.fixture
def hub(monkeypatch):
    """A local server in the Hub's place; it answers for models and data sets, or not."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            asked.append(self.path)
            self.send_response(200 if "nothing" not in self.path else 503)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(json.dumps([]).encode())

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield server, asked
        server.shutdown()


def findings(data=None):
    return {finding.what: finding for finding in doctor.examine(data)}


def test_weights_are_found_missing_or_wrong(hub, no_downloads, inception_file, monkeypatch):
    published = known_as_published(inception_file)
    monkeypatch.setattr(doctor, "_WEIGHTS", ((published, "FID", "--inception"),))
    missing = findings()["weights of FID"]
    assert missing.state == "missing"
    assert str(no_downloads / INCEPTION.name) in missing.found
    assert published.sha256 in missing.found
    assert INCEPTION.url in missing.fix
    assert "--inception" in missing.fix
    no_downloads.mkdir(parents=True)
    (no_downloads / INCEPTION.name).symlink_to(inception_file)
    assert findings()["weights of FID"].state == "ok"
    (no_downloads / INCEPTION.name).unlink()
    (no_downloads / INCEPTION.name).write_bytes(b"half")
    wrong = findings()["weights of FID"]
    assert (wrong.state, wrong.fix) == ("wrong", "remove it to download it again")


def test_the_hub_answers_or_not(hub, monkeypatch):
    server, asked = hub
    found = findings()["Hugging Face Hub"]
    assert found.state == "ok"
    assert asked == ["/api/models?limit=1", "/api/datasets?limit=1"]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}/nothing")
    found = findings()["Hugging Face Hub"]
    assert found.state == "missing"
    assert "HF_ENDPOINT" in found.fix
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in findings()["Hugging Face Hub"].found


def test_a_data_set_is_opened_if_it_is_named(hub, photo_folder, tmp_path):
    assert "data" not in findings()
    assert findings(str(photo_folder))["data"].found.endswith("6 images")
    (photo_folder / "0.jpg").write_bytes(b"no image")
    assert findings(str(photo_folder))["data"].state == "wrong"
    assert "no such folder" in findings(str(tmp_path / "none"))["data"].found


def test_packages_and_device_are_named(hub):
    found = findings()
    assert found["torch"].state == found["torch-fidelity"].state == "ok"
    assert "cores" in found["device"].found or "CUDA" in found["device"].found
    assert "vqhit-tiny-64" in found["packaged models"].found
