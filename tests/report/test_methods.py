"""Which runs are put together as a method, and with which others they are compared."""

import re
import shutil

from report_helpers import another_seed, changed, results

from ipwd_jax import report


def test_names_tell_all_groups_apart(runs):
    """They name settings that matter, and as many as are needed."""
    first, elsewhere, last = (another_seed(runs, "ipwd", seed, 60.0 + seed) for seed in (1, 2, 3))
    for folder in (first, elsewhere, last):
        changed(folder, "config.json", config__batch_size=32, config__data__dir="/elsewhere")
        changed(folder, "config.json", config__data__flip=False, config__epochs=7)
    changed(elsewhere, "config.json", config__weighting__ratio="B")
    changed(last, "config.json", config__weighting__ratio="B", config__weighting__clip=3.0)
    folders = [runs / "kd_seed0", runs / "ipwd_seed0", first, elsewhere, last]
    assert report.write_report(folders, runs / "all.html").problems == ()
    found = {name: row for (name, epoch), row in results(runs / "all.csv").items()
             if epoch == "last"}  # fmt: skip
    assert len(found) == 5
    assert {row["n"] for row in found.values()} == {"1"}
    means = {float(row["mean_top1"]) for name, row in found.items() if name.startswith("ipwd (")}
    assert {61.0, 62.0, 63.0} < means
    assert not any("dir" in name for name in found)


def test_runs_of_different_teachers(runs):
    """They are two methods, and their difference is marked; groups of classes are not mixed."""
    other = shutil.copytree(runs / "kd_seed0", runs / "kd_other")
    changed(other, "config.json", checksums__teacher="0" * 8, config__teacher__workdir="/other")
    changed(other, "result.json", last__top1=66.0)
    out = runs / "all.html"
    written = report.write_report(
        [runs / "kd_seed0", runs / "ipwd_seed0", other], out, runs / "kd_seed0"
    )
    (problem,) = written.problems
    assert "the teachers have different parameters" in problem
    assert "00000000: " in problem and "kd_other" in problem
    assert ("kd (teacher 00000000)", "last") in results(runs / "all.csv")
    groups = out.with_suffix(".md").read_text().partition("## Gains of favoured")[2]
    assert "00000000" not in groups.partition("\n## ")[0]


def test_seeds_stay_with_their_teacher(runs):
    for seed in (0, 1):
        other = shutil.copytree(runs / "kd_seed0", runs / f"kd_other_seed{seed}")
        changed(other, "config.json", checksums__teacher="0" * 8, config__seed=seed)
    folders = [runs / "kd_seed0", *sorted(runs.glob("kd_other_seed*"))]
    report.write_report(folders, runs / "all.html", runs / "kd_seed0")
    found = {name: row["n"] for (name, epoch), row in results(runs / "all.csv").items()}
    assert found["kd (teacher 00000000)"] == "2" and sorted(found.values()) == ["1", "2"]


def test_free_settings_make_no_method_of_an_unknown_weighting(runs):
    for folder in (runs / "ipwd_seed0", another_seed(runs, "ipwd", 1, 60.0)):
        changed(folder, "config.json", config__weighting__name="mine")
    changed(runs / "ipwd_seed1", "config.json", config__data__threads=4)
    report.write_report([runs / "ipwd_seed0", runs / "ipwd_seed1"], runs / "all.html")
    (row,) = (row for (_, epoch), row in results(runs / "all.csv").items() if epoch == "last")
    assert row["n"] == "2"


def test_the_run_of_a_teacher_is_left_out(runs):
    (teacher,) = runs.glob("squares_tiny_net_*")
    written = report.write_report(
        [teacher, runs / "kd_seed0", runs / "ipwd_seed0"], runs / "a.html"
    )
    assert [*written.problems] == [
        f"{teacher} is left out, because it is the teacher of other runs."
    ]
    assert {name for name, _ in results(runs / "a.csv")} == {"kd", "ipwd"}
    assert "left out" not in " ".join(report.write_report([teacher]).problems)


def test_standardised_distillation_is_not_plain(runs):
    other = shutil.copytree(runs / "kd_seed0", runs / "kd_ls_seed0")
    changed(other, "config.json", config__terms__kd__standardize=True)
    changed(other, "config.json", config__name="squares_kd_ls_tiny_net_tiny_net")
    report.write_report([other, runs / "kd_seed0"], runs / "all.html")
    assert results(runs / "all.csv")["kd_ls", "last"]["compared_with"] == "kd"


def test_published_numbers_are_of_all_data(runs):
    for name in ("ipwd", "kd"):
        folder = runs / f"{name}_seed0"
        changed(folder, "result.json", data="cifar100", network="resnet8x4")
        changed(folder, "config.json", config__name=f"cifar100_{name}_resnet32x4_resnet8x4")
        changed(folder, "config.json", config__teacher__name="resnet32x4")
        changed(folder, "config.json", config__model__name="resnet8x4")
        changed(folder, "config.json", config__data__name="cifar100")
        changed(folder, "config.json", config__data__long_tail=100.0)
    out = runs / "all.html"
    report.write_report([runs / "ipwd_seed0", runs / "kd_seed0"], out)
    text = out.with_suffix(".md").read_text()
    assert "Published numbers" not in text
    assert "data.long\\_tail=100.0" in text.partition("differ from the defaults")[2]


def test_a_method_without_curves(runs):
    (runs / "kd_seed0/metrics.csv").unlink()
    (runs / "ipwd_seed0/metrics.csv").unlink()
    written = report.write_report([runs / "ipwd_seed0", runs / "kd_seed0"], runs / "all.html")
    assert len(written.problems) == 2
    assert all("metrics.csv is missing or empty" in problem for problem in written.problems)


def test_epochs_of_two_stages_are_counted(runs):
    unfinished = another_seed(runs, "kd", 1, 60.0)
    (unfinished / "result.json").unlink()
    changed(unfinished, "config.json", config__first_stage__epochs=3)
    folders = [runs / "kd_seed0", runs / "ipwd_seed0", unfinished]
    (problem,) = report.write_report(folders, runs / "all.html").problems
    assert "it has trained 2 of 5 epochs" in problem


def test_curves_of_long_names_are_all_drawn(runs):
    for temperature in (2.0, 4.0, 8.0):
        folder = shutil.copytree(runs / "kd_seed0", runs / f"kd_T{temperature}")
        changed(folder, "config.json", config__terms__kd__temperature=temperature)
        changed(folder, "config.json", config__name=f"squares_{'k' * 30}d_tiny_net_tiny_net")
    folders = [runs / "ipwd_seed0", *sorted(runs.glob("kd_T*"))]
    report.write_report(folders, runs / "a b.html", runs / "ipwd_seed0", figures=True)
    drawn = (runs / "a b_figures/data0-training-0.svg").read_text()
    labels = set(re.findall(r"<!-- (k+[^>]*temperature=[248].0\)) -->", drawn)) or set(
        re.findall(r">(k+[^<]*=[248].0\))<", drawn)
    )
    assert len(labels) == 3 and max(map(len, labels)) <= 26
    assert "](a%20b_figures/data0-training-0.svg)" in (runs / "a b.md").read_text()


def test_the_name_of_the_data_is_no_part_of_the_method(runs):
    for name in ("ipwd", "kd"):
        changed(runs / f"{name}_seed0", "result.json", data="my_photos")
        pair = "my_photos_" + name + "_tiny_net_tiny_net"
        changed(runs / f"{name}_seed0", "config.json", config__name=pair, data__name="my_photos")
    report.write_report([runs / "ipwd_seed0", runs / "kd_seed0"], runs / "all.html")
    assert {name for name, _ in results(runs / "all.csv")} == {"ipwd", "kd"}
    changed(runs / "kd_seed0", "config.json", config__name="my_photos_tiny_net")
    changed(runs / "kd_seed0", "config.json", config__teacher__name="")
    report.write_report([runs / "ipwd_seed0", runs / "kd_seed0"], runs / "all.html")
    assert {name for name, _ in results(runs / "all.csv")} == {"ipwd", "0.1 ce + 0.9 kd"}


def test_labels_alone_without_a_name_of_their_own(runs):
    alone = shutil.copytree(runs / "kd_seed0", runs / "alone")
    changed(alone, "config.json", config__name="squares_tiny_net", config__teacher__name="")
    changed(alone, "config.json", config__loss__kd=0.0, config__loss__ce=1.0)
    changed(alone, "result.json", teacher=None)
    report.write_report([runs / "kd_seed0", alone], runs / "all.html")
    assert {name for name, _ in results(runs / "all.csv")} == {"kd", "ce"}


def test_an_unfinished_run_beside_a_baseline_is_named(runs):
    unfinished = another_seed(runs, "ipwd", 1, 60.0)
    (unfinished / "result.json").unlink()
    written = report.write_report(
        [runs / "ipwd_seed0", unfinished], runs / "a.html", runs / "kd_seed0"
    )
    assert any("is not finished and is left out" in problem for problem in written.problems)


def test_problems_of_a_baseline_are_named(runs):
    (runs / "kd_seed0/classes.csv").unlink()
    written = report.write_report([runs / "ipwd_seed0"], runs / "a.html", runs / "kd_seed0")
    assert any("kd_seed0" in problem for problem in written.problems)


def test_a_group_of_classes_without_test_images(runs):
    for method in ("kd", "ipwd"):
        another_seed(runs, method, 1, 60.0)
    folders = [runs / f"{method}_seed{seed}" for method in ("kd", "ipwd") for seed in (0, 1)]
    for folder in folders:
        rows = "class,recall_last,teacher_mass\na,50,9\nb,,8\nc,60,7\nd,70,6"
        (folder / "classes.csv").write_text(rows)
        changed(folder, "config.json", data__class_names=["a", "b", "c", "d"])
    report.write_report(folders, runs / "all.html")
    text = (runs / "all.md").read_text()
    assert "| kd | 50.00 | - | 60.00 | 70.00 |" in text
    assert r"| ipwd | 50.00 (+0.00 \[+0.00, +0.00\] (n=2)) | - (-) | 60.00" in text
