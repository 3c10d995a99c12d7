"""Tables show every number in full on a terminal of 80 columns."""

from vqhit.tables import evaluation_rows, print_table

EVERYTHING = {
    "rfid": 126.378,
    "is": 178.341,
    "is_std": 13.456,
    "psnr": 20.184,
    "ssim": 0.54321,
    "lpips": 0.23456,
    "codes_used": 16384,
    "codebook_size": 16384,
    "codebook_usage": 1.0,
    "dead_codes": 0,
    "codebook_perplexity": 14567.8,
    "seconds": 12345.6,
    "images_per_s": 4.05,
}


def test_an_evaluation_with_every_metric_is_shown_in_full(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    print_table("a title", evaluation_rows(EVERYTHING))
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    for value in (
        "126.378",
        "178.34 ± 13.46",
        "20.18",
        "0.5432",
        "0.2346",
        "16384 of 16384 (100.0%), 0 dead",
        "14567.8",
    ):
        assert value in printed
