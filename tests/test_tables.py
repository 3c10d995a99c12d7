"""Tables show every number in full on a terminal of 80 columns."""

from vqhit.tables import evaluation_rows, print_table, speed_row, training_row

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


def test_a_comparison_of_speeds_is_shown_in_full(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    row = {
        "contender": "taming compiled",
        "precision": "bfloat16",
        "images_per_s": 1234.5678,
        "relative": 12.345,
        "relative_lowest": 11.111,
        "relative_highest": 13.579,
        "relative_in_mode": 10.987,
        "gflops": 1234.56,
        "gflops_per_s": 234567.8,
        "peak_mib": 45678.9,
        "compile_s": 345.6,
        "tokens_differing": None,
        "largest_difference": 0.0123,
    }
    tokens = row | {"tokens_differing": 0.98765, "largest_difference": None}
    nothing = tokens | {"compile_s": None, "tokens_differing": None}
    print_table("a title", [speed_row("reconstruct", values) for values in (row, tokens, nothing)])
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 120
    expected = "reconstruct taming compiled bfloat16 1235 12.35 11.11-13.58 10.99 1234.6 234568 45679"
    first, second, third = (" ".join(line.split()) for line in printed.splitlines() if "reconstruct" in line)
    assert first == f"{expected} 346 1e-02"
    assert second == f"{expected} 346 98.77%"
    assert third == f"{expected} - -"


def test_a_comparison_of_training_is_shown_in_full(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    row = {
        "contender": "vqhit, activation checkpointing",
        "precision": "bfloat16",
        "images_per_s": 1234.5678,
        "relative": 12.345,
        "relative_lowest": 11.111,
        "relative_highest": 13.579,
        "gflops": 1234.56,
        "gflops_per_s": 234567.8,
        "peak_mib": 45678.9,
    }
    print_table("a title", [training_row("step, R1 every step", row)])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 120
    (line,) = (" ".join(line.split()) for line in printed.splitlines() if "step, R1" in line)
    expected = "vqhit, activation checkpointing bfloat16 1235 12.35 11.11-13.58 1234.6 234568 45679"
    assert line == f"step, R1 every step {expected}"
