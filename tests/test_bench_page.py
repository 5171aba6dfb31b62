"""The page of recorded rows: it stands alone, shows wins and losses alike, and its filter works in a browser."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest
from test_benchmarks import make_row

from benchmarks import page, report

pytest.importorskip("matplotlib", reason="matplotlib, which draws the page, is not installed: pip install '.[bench]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def row(impl="triton", p50=100.0, kind="ours", **changes):
    work = {"bytes": 4 << 20, "flops": 1 << 22, "peak_memory": 1 << 20, "matmul_tflop_s": 700.0, "error_in": "output 0"}
    return make_row(impl, p50, kind, **work | changes)


@pytest.fixture(scope="module")
def rows():
    won = [row(), row("eager", 300.0, "baseline"), row("compile", 150.0, "baseline")]
    lost = [row(p50=80.0, shape="small"), row("eager", 40.0, "baseline", shape="small")]
    long = [row(op="qk_norm_rope", p50=n / 9, shape=f"{n}", dims={"dim": 64, "tokens": n}) for n in (1024, 2048, 4096)]
    return won + lost + long


@pytest.fixture(scope="module")
def file(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "rows.jsonl"
    machine_line = json.dumps({"format": report.FORMAT, "machine": {"device": "NVIDIA H200"}})
    path.write_text("\n".join([machine_line, *map(json.dumps, rows)]) + "\n")
    return path


@pytest.fixture(scope="module")
def drawn(file):
    assert page.main([str(file), "--out", str(file.with_suffix(".html"))]) == 0
    return file.with_suffix(".html").read_text()


def browse(document: str, folder, script: str = "", fragment: str = "") -> dict:
    """What a browser makes of the page once `script` has run: {"errors", "cases" and "marks" shown, "said"}."""
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome in PATH: the page was not opened in a browser")
    watched = "<script>window.errors = []; onerror = (m) => { errors.push(String(m)); };</script>"
    told = """<script>%s
      const seen = (s) => [...document.querySelectorAll(s)].filter((e) => e.getClientRects().length);
      const result = document.createElement("pre"); result.id = "result";
      result.textContent = JSON.stringify({errors, said: document.querySelector("output").textContent,
        cases: seen(".case").map((e) => `${e.dataset.op} ${e.dataset.shape}`), marks: seen(".mark").length,
        plots: seen(".plot svg").filter((e) => e.getBoundingClientRect().width > 200).length, hash: location.hash});
      document.body.append(result);</script>"""
    path = folder / "browsed.html"
    path.write_text(document.replace("<style>", watched + "<style>", 1).replace("</html>", told % script + "</html>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom",
               f"--user-data-dir={folder / 'profile'}", f"{path.as_uri()}{fragment}"]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return json.loads(html.unescape(re.search(r'<pre id="result">(.*?)</pre>', dom, re.S)[1]))


def test_the_page_refers_to_nothing_outside_and_is_the_same_for_the_same_rows(rows, drawn):
    assert not re.findall(r"src=|href=\"[^#]|url\([^#]|@import|fetch\(|<link", drawn)
    assert drawn == page.page(rows)
    ids = re.findall(r'<(?:clipPath|path) id="(\w+)"', drawn)
    assert len(ids) == len(set(ids)), "a definition hides another plot's"


def test_wins_and_losses_stand_side_by_side(drawn):
    assert "<b>3.00× eager</b><b>1.50× compile</b>" in drawn and "<b class=loss>0.50× eager</b>" in drawn
    assert drawn.count("class='case lost'") == 1 and 'data-lost="1"' in drawn
    assert "error 1.0e-06 of 2.0e-06 in output 0" in drawn and "0.5 of bound" in drawn
    assert "Time and memory of qk_norm_rope by tokens" in drawn and "Roofline of norm_modulate" in drawn


def test_what_has_no_figure_says_why():
    figures = dict.fromkeys(("p20_us", "p50_us", "p80_us", "bytes", "percent_copy"))
    wrong = row(impl="cuda") | figures | {"status": "failed", "reason": "wrong: <b>NaN</b>"}
    absent = row(impl="quack", kind="peer") | figures | {"status": "unavailable", "reason": "quack is not installed"}
    text = page.page([wrong, absent])
    assert "<p class=wrong>cuda failed: wrong: &lt;b&gt;NaN&lt;/b&gt;</p>" in text and "class='case lost'" in text
    assert "1 not measured here</summary>quack: quack is not installed" in text


def test_a_browser_loads_it_without_errors_and_its_plots_are_there(drawn, tmp_path):
    seen = browse(drawn, tmp_path)
    assert seen["errors"] == [] and seen["said"] == "5 cases, 1 of them lost"
    assert seen["plots"] == drawn.count("<figure class=plot") == 4 and seen["marks"] > 8


def test_its_filter_leaves_what_was_chosen(drawn, tmp_path):
    chosen = "const s = document.querySelector('select[name=op]'); s.value = 'norm_modulate';"
    seen = browse(drawn, tmp_path, chosen + "s.dispatchEvent(new Event('change'));")
    assert seen["cases"] == ["norm_modulate small", "norm_modulate toy"] and seen["errors"] == []
    assert seen["plots"] == 1 and seen["marks"] == 5 and seen["hash"] == "#op=norm_modulate"
    seen = browse(drawn, tmp_path, "document.querySelector('input[name=lost]').click();", "#op=norm_modulate")
    assert seen["cases"] == ["norm_modulate small"] and seen["said"] == "1 cases, 1 of them lost"
    seen = browse(drawn, tmp_path, "document.querySelector('button').click();", "#shape=toy&lost=1")
    assert len(seen["cases"]) == 5 and seen["hash"] == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"op": "norm_mod', "rows.jsonl:1 is half a line"),
        ('{"format": 0, "machine": {}}\n', "expected rows of format 1, got format 0; another version"),
        ("", "no rows in"),
        (None, "does not exist"),
    ],
)
def test_results_that_cannot_be_drawn_are_named_and_nothing_is_written(tmp_path, capsys, text, said):
    file, out = tmp_path / "rows.jsonl", tmp_path / "report.html"
    if text is not None:
        file.write_text(text)
    assert page.main([str(file), "--out", str(out)]) == 1
    assert said in capsys.readouterr().err and not out.exists()


def test_curves_over_the_length_of_a_clip_are_drawn_from_what_stream_memory_records(tmp_path):
    facts = {name: row()[name] for name in ("device", "driver", "threads", "torch", "commit", "dirty", "date")}
    lines = [
        dict(code="decode", coder=coder, frames=n, base=16, pixels=64, tile=None, peak_mib=n, seconds=n)
        for coder in ("ours", "diffusers")
        for n in (17, 65)
    ]
    (tmp_path / "frames.jsonl").write_text("".join(json.dumps(line | facts) + "\n" for line in lines))
    text = page.page(page.load([tmp_path]))
    assert "ours forward: 1.7e+04 at 17, 6.5e+04 at 65" in text and "diffusers forward: 17 at 17, 65 at 65" in text
