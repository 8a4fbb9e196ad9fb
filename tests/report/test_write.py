"""Reports of runs: what is on the page and in the files beside it, and what cannot be reported."""

import json
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.stats
from report_helpers import another_seed, changed, results

from ipwd_jax import metrics, report
from ipwd_jax.errors import UserError
from ipwd_jax.report import published
from ipwd_jax.report.__main__ import main


def test_a_single_run(runs, capsys):
    run = runs / "ipwd_seed0"
    main([str(run), f"--baseline={runs / 'kd_seed0'}"])
    out, err = capsys.readouterr()
    assert err == "" and out == f"Written to {run / 'report.html'}, {run / 'report.md'}\n"
    page, text = (run / "report.html").read_text(), (run / "report.md").read_text()
    result = json.loads((run / "result.json").read_text())
    assert f"{result['last']['top1']:.2f} %" in page
    assert page.count("<svg") == page.count("<figcaption>") - 24 == 8
    for words in ("learning rate falls", "Transfer gap", "Spearman", "0.1", "Settings that differ"):
        assert words in page
    predictions = np.load(run / "predictions.npz")
    logits, labels = predictions["last_logits"], predictions["labels"]
    ece = metrics.evaluate(logits, labels)["ece"]
    assert f"student: ECE {ece:.2f} %" in page and f"student {ece:.2f} %" in text
    assert f"student: AURC {result['last']['aurc']:.2f}" in page
    correlation = result["weights"]["mass_correlation_A"]
    assert f"rank correlation: {correlation:+.3f}" in text
    samples = np.load(run / "samples.npz")
    heaviest = int(np.argsort(samples["weight"], kind="stable")[-1])
    assert f"training image {heaviest}, class" in page
    gains = [
        metrics.group_recall(
            np.load(runs / name / "predictions.npz")["last_logits"], labels, samples["class_mass"]
        )[0]
        for name in ("ipwd_seed0", "kd_seed0")
    ]
    assert f"group 1 {gains[0] - gains[1]:+.2f}" in text


def test_a_page_needs_nothing_else_and_shows_names_as_they_are(runs):
    report.write_report([runs / "ipwd_seed0"])
    page = (runs / "ipwd_seed0/report.html").read_text()
    assert "<script" not in page and "<b>light" not in page
    assert "&lt;b&gt;light&lt;/b&gt; &amp; $\\frac" in page
    links = re.findall(r'(?:href|src)="([^"]{,20})', page)
    assert links and all(link.startswith(("#", "data:")) for link in links)
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert all(link[1:] in identifiers for link in re.findall(r'href="(#[^"]+)"', page))
    assert "currentColor" in page and "prefers-color-scheme: dark" in page
    assert all("alt=" in image for image in re.findall(r"<img [^>]*>", page))
    assert all("aria-label=" in drawing for drawing in re.findall(r"<svg [^>]*>", page))
    text = (runs / "ipwd_seed0/report.md").read_text()
    assert r"dark\|\_\*" in text and "<b>" not in text


def test_figures_as_files(runs):
    """The Markdown file shows each of them, and each is a whole SVG file with its own colours."""
    out = runs / "one.html"
    main([str(runs / "ipwd_seed0"), f"--out={out}", "--figures"])
    shown = re.findall(
        r"!\[[^\n]+\]\(one_figures/([\w-]+\.svg)\)", out.with_suffix(".md").read_text()
    )
    files = sorted((runs / "one_figures").iterdir())
    assert sorted(shown) == [file.name for file in files] and len(files) == 7
    for file in files:
        root = ElementTree.fromstring(file.read_text())
        assert "prefers-color-scheme" in root.find("{*}style").text and root.get("width") == "484"


def test_seeds_are_averaged_and_methods_compared(runs, capsys):
    first = {
        name: json.loads((runs / f"{name}_seed0/result.json").read_text())["last"]["top1"]
        for name in ("ipwd", "kd")
    }
    ours, theirs = [first["ipwd"], 70.0, 74.0], [first["kd"], 69.0, 71.0]
    for seed in (1, 2):
        another_seed(runs, "ipwd", seed, ours[seed])
        another_seed(runs, "kd", seed, theirs[seed])
    another_seed(runs, "ipwd", 7, 50.0)  # has no partner
    out = runs / "all.html"
    main([*map(str, sorted(runs.glob("*_seed?"))[:7]), f"--out={out}"])
    assert capsys.readouterr().err == ""
    ipwd, kd = results(runs / "all.csv")["ipwd", "last"], results(runs / "all.csv")["kd", "last"]
    assert (ipwd["n"], kd["n"], ipwd["common_seeds"], ipwd["compared_with"]) == (
        "4",
        "3",
        "3",
        "kd",
    )
    assert float(kd["mean_top1"]) == pytest.approx(np.mean(theirs))
    assert float(kd["deviation_top1"]) == pytest.approx(np.std(theirs, ddof=1))
    expected = scipy.stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    found = [float(ipwd[f"difference_{end}"]) for end in ("low", "high")]
    np.testing.assert_allclose(found, expected)
    shown = f"{np.mean(theirs):.2f} ± {np.std(theirs, ddof=1):.2f} (n=3)"
    assert shown in out.read_text() and shown in out.with_suffix(".md").read_text()
    assert shown.replace("±", r"$\pm$") in out.with_suffix(".tex").read_text()
    assert ">teacher</th>" in out.read_text()


def test_gains_of_classes_by_the_teachers_mass(runs):
    """Four groups of two classes; a run without a teacher is cut by the mass that others noted."""
    alone = shutil.copytree(runs / "kd_seed0", runs / "ce_seed0")
    changed(alone, "config.json", config__name="squares_ce_tiny_net", config__teacher__name="")
    changed(alone, "config.json", config__loss__kd=0.0, config__loss__ce=1.0)
    changed(alone, "result.json", teacher=None)
    mass = [5, 80, 10, 60, 70, 40, 20, 30]  # groups {1, 4}, {3, 5}, {7, 6}, {2, 0}
    recalls = {
        "kd": [50, 90, 52, 70, 88, 72, 60, 64],
        "ipwd": [58, 86, 60, 70, 88, 72, 60, 66],
        "ce": [50, 80, 50, 70, 80, 70, 60, 60],
    }
    weights = [9, 1, 8, 3, 2, 4, 7, 6]
    for name, recall in recalls.items():
        rows = [f"class,recall_last{',teacher_mass' if name != 'ce' else ''},weight_mean"]
        for label, share in enumerate(recall):
            of_mass = f",{mass[label]}" if name != "ce" else ""
            rows.append(f"{label},{share}{of_mass},{weights[label] if name == 'ipwd' else ''}")
        (runs / f"{name}_seed0/classes.csv").write_text("\n".join(rows))
        changed(runs / f"{name}_seed0", "config.json", data__class_names=[*map(str, range(8))])
    out = runs / "all.html"
    main([*(str(runs / f"{name}_seed0") for name in ("ipwd", "kd", "ce")), f"--out={out}"])
    text, minus = out.with_suffix(".md").read_text(), "\N{MINUS SIGN}"
    assert "| kd | 89.00 | 71.00 | 62.00 | 51.00 | - |" in text
    gains = f"| ipwd | 87.00 ({minus}2.00 (n=1)) | 71.00 (+0.00 (n=1)) | 63.00 (+1.00 (n=1)) | "
    with_mass = scipy.stats.spearmanr(np.subtract(recalls["ipwd"], recalls["kd"]), mass).statistic
    assert gains + f"59.00 (+8.00 (n=1)) | {minus}{-with_mass:.2f} (n=1) |" in text
    assert f"| ce | 80.00 ({minus}9.00 (n=1)) |" in text
    correlation = scipy.stats.spearmanr(weights, mass).statistic
    row = next(line for line in text.splitlines() if line.startswith("| ipwd | tiny\\_net → "))
    summary = json.loads((runs / "ipwd_seed0/result.json").read_text())["weights"]
    assert f" | {summary['weight_mean']:.3g} | " in row
    assert f" | {correlation:.3g} | ".replace("-", minus) in row
    page = out.read_text()
    assert "rank correlation of class weight and teacher's mass over the epochs" in page
    (runs / "kd_seed0/classes.csv").write_text("class,recall_last\n0,\0")
    main([*(str(runs / f"{name}_seed0") for name in ("ipwd", "kd")), f"--out={out}"])
    assert "Recall (%)" not in out.read_text()
    assert "kd_seed0/classes.csv is damaged: it has 1 rows for 8 classes" in out.read_text()


def test_a_student_without_a_teacher_is_in_the_column_of_each_teacher(runs, capsys):
    """Its row is compared with distillation from that teacher, and its run is listed once."""
    alone = shutil.copytree(runs / "kd_seed0", runs / "ce_seed0")
    changed(alone, "config.json", config__name="squares_ce_tiny_net", config__teacher__name="")
    changed(alone, "config.json", config__loss__kd=0.0, config__loss__ce=1.0)
    changed(alone, "result.json", teacher=None, last__top1=61.0)
    out = runs / "all.html"
    main([*(str(runs / f"{name}_seed0") for name in ("ipwd", "kd", "ce")), f"--out={out}"])
    assert "no run of kd" not in capsys.readouterr().err
    row = results(runs / "all.csv")["ce", "last"]
    assert row["teacher"] == "tiny_net" and float(row["difference"]) == pytest.approx(61 - 65)
    text = out.with_suffix(".md").read_text()
    assert text.count(" alone |") == text.count("ce\\_seed0 |") == 1  # in the list of all runs


def test_published_numbers_are_shown_beside_ours(runs):
    pair = "resnet32x4 → resnet8x4"
    for name in ("ipwd", "kd"):
        changed(runs / f"{name}_seed0", "result.json", data="cifar100", network="resnet8x4")
        changed(runs / f"{name}_seed0", "result.json", last__top1=70.0)
        folder = runs / f"{name}_seed0"
        changed(folder, "config.json", config__name=f"cifar100_{name}_resnet32x4_resnet8x4")
        changed(folder, "config.json", config__teacher__name="resnet32x4")
        changed(folder, "config.json", config__model__name="resnet8x4")
    out = runs / "all.html"
    report.write_report([runs / "ipwd_seed0", runs / "kd_seed0"], out)
    assert "Published" not in out.with_suffix(".md").read_text()  # other data of the same name
    for name in ("ipwd", "kd"):
        changed(runs / f"{name}_seed0", "config.json", config__data__name="cifar100")
    main([str(runs / "ipwd_seed0"), str(runs / "kd_seed0"), f"--out={out}"])
    text = out.with_suffix(".md").read_text().partition("## Published numbers")[2]
    numbers, minus = published.of_data("cifar100"), "\N{MINUS SIGN}"
    assert numbers["kd"]["top1"][pair] == 73.33 and numbers["ipwd"]["top1"][pair] == 76.03
    assert f"| kd | 73.33 ({minus}3.33) |" in text and f"| ipwd | 76.03 ({minus}6.03) |" in text
    assert "kd: RepDistiller's README, last epoch" in text


def test_methods_that_share_a_name_are_told_apart(runs):
    clipped = another_seed(runs, "ipwd", 1, 60.0)
    changed(clipped, "config.json", config__weighting__clip=3.0)
    other = another_seed(runs, "kd", 1, 61.0)
    changed(other, "config.json", config__name="something else", config__data__dir="/elsewhere")
    written = report.write_report(
        [runs / "ipwd_seed0", clipped, runs / "kd_seed0", other], runs / "all.html"
    )
    assert written.problems == ()
    found = results(runs / "all.csv")
    assert {name for name, _ in found} == {
        "kd",
        "ipwd (weighting.clip=0.0)",
        "ipwd (weighting.clip=3.0)",
    }
    assert found["kd", "last"]["n"] == "2"
    assert found["ipwd (weighting.clip=3.0)", "last"]["common_seeds"] == "1"
    again = report.write_report([clipped, runs / "kd_seed0"], runs / "b.html", runs / "ipwd_seed0")
    assert again.files[0] == runs / "b.html"
    compared = {row["compared_with"] for row in results(runs / "b.csv").values()}
    assert compared == {"", "ipwd (weighting.clip=0.0)"}


def test_a_setting_that_is_newer_than_a_run_is_no_difference(runs):
    path = runs / "kd_seed0/config.json"
    noted = json.loads(path.read_text())
    del noted["config"]["data"]["validation_fraction"], noted["config"]["first_stage"]
    path.write_text(json.dumps(noted))
    report.write_report([runs / "kd_seed0", runs / "ipwd_seed0"], runs / "all.html")
    settings = (runs / "all.md").read_text().partition("## Settings")[2]
    assert "weighting.name=ipwd" in settings
    assert "validation" not in settings and "first" not in settings


def test_what_cannot_be_reported_is_named(runs, capsys):
    (runs / "none").mkdir()
    shutil.copytree(runs / "ipwd_seed0", runs / "damaged")
    (runs / "damaged/result.json").write_text('{"last": {}}')
    unfinished = another_seed(runs, "kd", 1, 60.0)
    (unfinished / "result.json").unlink()
    double = shutil.copytree(runs / "kd_seed0", runs / "double")
    other = another_seed(runs, "ipwd", 1, 60.0)
    changed(other, "config.json", checksums__data="0" * 16)
    no_curves = another_seed(runs, "ipwd", 2, 60.0)
    (no_curves / "metrics.csv").write_bytes(b"\xff\x00")
    given = ["none", "damaged", "kd_seed0", "ipwd_seed0", "ipwd_seed0"]
    folders = [runs / name for name in given] + [unfinished, double, other, no_curves]
    main([*map(str, folders), f"--out={runs / 'all.html'}"])
    err = capsys.readouterr().err
    for words in (
        "none/config.json is missing",
        "damaged/result.json is damaged",
        "ipwd_seed0 was given twice",
        "kd_seed1 is not finished and is left out: it has trained 2 of 2 epochs",
        "double has the same settings and seed as",
        "The runs are of different data",
        "ipwd_seed2/metrics.csv cannot be read",
    ):
        assert words in err and words in (runs / "all.html").read_text()
    assert "Traceback" not in err


def test_parts_of_a_run_that_are_missing(runs):
    kd = report.write_report([runs / "kd_seed0"])
    assert [p.partition(":")[0] for p in kd.problems] == ["Weights of the samples"]
    assert "has no samples.npz" in kd.files[0].read_text()
    run = runs / "ipwd_seed0"
    (run / "predictions.npz").write_bytes(b"PK")
    changed(run, "config.json", config__data__name="digits")
    written = report.write_report([run])
    assert len(written.problems) == 3
    for words in ("predictions.npz cannot be read", "the data digits has changed since the run"):
        assert any(words in problem for problem in written.problems)
    (run / "result.json").unlink()
    unfinished = report.write_report([run])
    assert "2 of 2 epochs" in unfinished.problems[0]
    assert unfinished.files[0].read_text().count("<svg") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing"], "nothing can be reported: nothing is not the"),
        (["kd_seed0", "--out=page.txt"], "the page must be called FILE.html"),
        (["kd_seed0", "--baseline=nothing"], "error: nothing is not the"),
        (["kd_seed0", "--out=kd_seed0/result.json/a.html"], "cannot be written"),
        (["kd_seed0", "--baseline=ipwd_seed1"], "give a --baseline of the same data"),
    ],
)
def test_mistakes(arguments, words, runs, capsys, monkeypatch):
    changed(another_seed(runs, "ipwd", 1, 60.0), "config.json", checksums__data="0" * 16)
    monkeypatch.chdir(runs)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_runs_of_which_none_is_finished(runs):
    for name in ("ipwd_seed0", "kd_seed0"):
        (runs / name / "result.json").unlink()
    with pytest.raises(UserError, match="none of these runs is finished"):
        report.write_report([runs / "ipwd_seed0", runs / "kd_seed0"])


def test_training_does_not_wait_for_matplotlib():
    code = "import sys, ipwd_jax.report; sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("which", ["one", "several"])
def test_a_browser_finds_no_error(which, runs, tmp_path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("neither chromium nor google-chrome is installed")
    names = ["ipwd_seed0"] if which == "one" else ["ipwd_seed0", "kd_seed0"]
    page = report.write_report([runs / name for name in names], tmp_path / "page.html").files[0]
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    shown = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and "</html>" in shown.stdout
    assert "CONSOLE" not in shown.stderr
