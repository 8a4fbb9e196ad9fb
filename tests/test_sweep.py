"""`python -m ipwd_jax.sweep`: many runs in one folder, skipped, stopped, shared and refused."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
from helpers import ROOT, module_of

from ipwd_jax import api, data, signals, sweep, teachers, train, validate, workdir
from ipwd_jax.errors import Interrupted
from ipwd_jax.loop import Loop
from ipwd_jax.runs import load_run

SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.py"))
# Two seeds of KD after each other, and two seeds of IPWD in one program; one teacher.
BODY = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from helpers import settings, squares
from ipwd_jax import data

data.SOURCES["squares"] = lambda config: squares()

def get_runs(rate="0.5"):
    constant = {{"optimizer__milestones": (), "teacher__optimizer__milestones": ()}}
    kd = settings(name="kd", weighting__name="uniform", loss__cls=0.0, **constant)
    kd.optimizer.learning_rate = float(rate)
    ipwd = settings(name="ipwd", seeds=(2, 3), **constant)
    return [{{"config": kd, "seeds": (0, 1)}}, {{"config": ipwd}}]
"""
RUNS = ["kd_seed0", "kd_seed1", "ipwd"]
STUDENTS = ["kd_seed0", "kd_seed1", "ipwd_seed2", "ipwd_seed3"]
WHICH = ("last", "best")


@pytest.fixture(autouse=True)
def sources():
    """Takes out again the source of data that the file of a sweep adds."""
    with mock.patch.dict(data.SOURCES):
        yield


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sweep_file.py"
    path.write_text(BODY)
    return path


def call(*arguments, status=0):
    """The command line, in this process."""
    with pytest.raises(SystemExit) as left:
        sweep.main(list(map(str, arguments)))
    assert left.value.code == status


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "ipwd_jax.sweep", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process):
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and not errors, output + errors
    return output


@contextlib.contextmanager
def in_place_of_training(function):
    """The folders that `function(config, workdir)` is called with instead of `train.run`."""
    with mock.patch.object(sweep.train, "run", side_effect=function) as run:
        yield lambda: [call.args[1].name for call in run.call_args_list]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a sweep that nothing disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "sweep_file.py").write_text(BODY)
    out = folder / "runs"
    return out, output_of(start(f"--config={folder / 'sweep_file.py'}", f"--out={out}"))


def assert_same_predictions(folder, other):
    with np.load(folder / "predictions.npz") as mine, np.load(other / "predictions.npz") as its:
        assert mine.files == its.files
        for name in mine.files:
            np.testing.assert_array_equal(mine[name], its[name])


class TestWholeSweep:
    def test_all_runs_and_one_teacher_are_trained(self, finished):
        out, output = finished
        (teacher,) = out.glob("squares_tiny_net_*")
        assert {path.parent.name for path in out.glob("*/result.json")} == {*STUDENTS, teacher.name}
        assert output.count("Teacher tiny_net in") == 1
        assert "0 of 3 runs are finished already" in output
        assert f"Run 1 of 3: {out / 'kd_seed0'}\n" in output
        assert f"Run 3 of 3: {out / 'ipwd'}, seeds 2, 3\n" in output
        assert "3 runs: 3 finished\n" in output

    def test_the_table_has_mean_and_deviation_over_the_seeds(self, finished):
        out, output = finished
        rows = [re.split(r"  +", line) for line in output.splitlines()]
        for name, seeds in (("kd", (0, 1)), ("ipwd", (2, 3))):
            results = [load_run(out / f"{name}_seed{seed}").result for seed in seeds]
            cells = [
                f"{np.mean(top1):.2f} +- {np.std(top1, ddof=1):.2f}"
                for top1 in ([result[which]["top1"] for result in results] for which in WHICH)
            ]
            assert [name, ",".join(map(str, seeds)), *cells] in rows

    def test_a_second_call_trains_nothing(self, finished, file, capsys):
        out, output = finished
        with in_place_of_training(AssertionError):
            call(f"--config={file}", f"--out={out}")
        shown = capsys.readouterr().out
        assert "3 of 3 runs are finished already" in shown
        assert output.endswith(shown.partition("\n")[2])  # the same table and summary

    def test_a_dry_run_lists_the_runs(self, finished, file, tmp_path, capsys):
        sweep.main([f"--config={file}", f"--out={finished[0]}", "--dry_run"])
        assert capsys.readouterr().out.count(": finished\n") == 3
        out = tmp_path / "new"
        sweep.main([f"--config={file}", f"--out={out}", "--dry_run"])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"Run 1 of 3: {out / 'kd_seed0'}: not begun" and not out.exists()

    def test_finished_runs_of_another_config_are_no_results(self, finished, file, capsys):
        call(f"--config={file}:0.1", f"--out={finished[0]}", status=1)
        shown = capsys.readouterr()
        assert shown.err.count("config.optimizer.learning_rate: 0.5 there, 0.1 here") == 2
        assert "3 runs: 1 finished, 2 failed\n" in shown.out
        assert not re.search("^kd ", shown.out, re.M) and re.search("^ipwd ", shown.out, re.M)


def test_index_and_count_take_every_run_once(file, tmp_path):
    taken = []
    for index in range(2):
        with in_place_of_training(lambda config, folder: None) as names:
            call(f"--config={file}", f"--out={tmp_path}", "--count=2", f"--index={index}")
            assert names() == RUNS[index::2]
            taken += names()
    assert sorted(taken) == sorted(RUNS)


class TestMinutes:
    @staticmethod
    def rings_at(number):
        """Lets the timer ring after so many steps of a process, but for the last of an epoch."""
        between_calls, count = Loop._between_calls, 0

        def ring(self, *arguments):
            nonlocal count
            count += 1
            if count == number:
                signal.raise_signal(signal.SIGALRM)
            between_calls(self, *arguments)

        return mock.patch.object(Loop, "_between_calls", ring)

    def test_interrupted_runs_are_resumed_bitwise(self, finished, file, tmp_path, capsys):
        out = tmp_path / "runs"
        arguments = (f"--config={file}", f"--out={out}", "--count=3", "--index=1")
        for number, stopped in ((1, "squares_tiny_net_*"), (4, "kd_seed1")):
            with self.rings_at(number):
                call(*arguments, "--minutes=1000")
            assert "The 1000 minutes of this call are over" in capsys.readouterr().out
            (checkpoints,) = out.glob(f"{stopped}/checkpoints")
            assert not (checkpoints.parent / "result.json").exists()
        call(*arguments)
        shown = capsys.readouterr().out
        assert "Resuming at step 4 of" in shown and "1 run: 1 finished" in shown
        assert_same_predictions(out / "kd_seed1", finished[0] / "kd_seed1")

    def test_the_timer_acts_like_ctrl_c_while_a_run_trains(self, file, tmp_path, capsys):
        def until_a_signal_comes(config, folder):
            with signals.collected() as received:
                while not received:
                    time.sleep(0.01)
                time.sleep(0.2)  # the timer rings again and leaves the run in peace
            raise Interrupted(*received)

        with (
            mock.patch.object(sweep, "_RING_AGAIN", 0.05),
            in_place_of_training(until_a_signal_comes) as names,
        ):
            call(f"--config={file}", f"--out={tmp_path}", "--minutes=0.001")
        assert names() == RUNS[:1] and "3 runs: 3 unfinished\n" in capsys.readouterr().out

    def test_the_timer_ends_a_wait_even_if_its_first_interrupt_is_lost(self, file, tmp_path):
        lost = []

        def loses_one(config, folder):
            try:
                time.sleep(100)
            except KeyboardInterrupt:
                lost.append(folder)
                time.sleep(100)

        again = mock.patch.object(sweep, "_RING_AGAIN", 0.1)
        with again, in_place_of_training(loses_one) as names:
            call(f"--config={file}", f"--out={tmp_path}", "--minutes=0.001")
        assert names() == RUNS[:1] and len(lost) == 1

    def test_handlers_and_timer_are_as_before(self, file, tmp_path):
        before = signal.getsignal(signal.SIGALRM)
        with in_place_of_training(lambda config, folder: None):
            call(f"--config={file}", f"--out={tmp_path}", "--minutes=5")
        assert signal.getsignal(signal.SIGALRM) == before
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


@pytest.mark.parametrize(("error", "status"), [(Interrupted(15), 143), (KeyboardInterrupt(), 130)])
def test_a_signal_ends_the_sweep(error, status, file, tmp_path, capsys):
    with in_place_of_training([error]):
        call(f"--config={file}", f"--out={tmp_path}", "--minutes=5", status=status)
    assert "the same command resumes from here" in capsys.readouterr().err


class TestSharedFolder:
    def test_a_run_in_use_is_tried_again_after_the_others(self, file, tmp_path, capsys):
        locks, trained = contextlib.ExitStack(), []

        def train_one(config, folder):
            with workdir.locked(folder):
                trained.append(folder.name)
            if len(trained) == 2:
                locks.close()

        with in_place_of_training(train_one), locks:
            locks.enter_context(workdir.locked(tmp_path / "kd_seed1"))
            call(f"--config={file}", f"--out={tmp_path}")
        assert trained == [*(name for name in RUNS if name != "kd_seed1"), "kd_seed1"]
        assert "3 runs: 3 finished\n" in capsys.readouterr().out

    def test_a_run_that_stays_in_use_is_named(self, file, tmp_path, capsys):
        with in_place_of_training(train.run), workdir.locked(tmp_path / "kd_seed1"):
            call(f"--config={file}", f"--out={tmp_path}", "--count=3", "--index=1")
        shown = capsys.readouterr().out
        assert "1 run: 1 in use by another process\n" in shown
        assert f"  in use by another process: {tmp_path / 'kd_seed1'}\n" in shown

    @pytest.mark.slow
    def test_two_processes_train_every_run_once(self, finished, file, tmp_path):
        out = tmp_path / "runs"
        processes = [start(f"--config={file}", f"--out={out}") for _ in range(2)]
        both = "".join([output_of(process) for process in processes])
        for name in STUDENTS:
            assert_same_predictions(out / name, finished[0] / name)
        assert both.count("Teacher tiny_net in") == 1
        for name in RUNS:
            begun = len(re.findall(rf"^Run \d of 3: {out / name}\b", both, re.M))
            in_use = both.count(f"{out / name} is in use by another process")
            kept = len(set(re.findall(rf"^Finished already: ({out / name}\w*)$", both, re.M)))
            assert begun - in_use - bool(kept) == 1, both


def test_a_run_that_is_refused_does_not_stop_the_others(file, tmp_path, capsys):
    file.write_text(
        BODY.partition("    constant = ")[0]
        + """
    alone = {"teacher__name": "", "weighting__name": "uniform", "loss__kd": 0.0, "loss__cls": 0.0}
    alone["optimizer__milestones"] = ()
    wrong = settings(name="wrong", data__name="folder:/nowhere", **alone)
    return [{"config": wrong}, {"config": settings(name="right", **alone)}]
"""
    )
    call(f"--config={file}", f"--out={tmp_path}", status=1)
    shown = capsys.readouterr()
    assert f"error: {tmp_path / 'wrong_seed0'}: " in shown.err and "/nowhere" in shown.err
    assert "2 runs: 1 finished, 1 failed\n" in shown.out
    assert (tmp_path / "right_seed0" / "result.json").exists()


def test_an_error_that_nobody_foresaw_does_not_stop_the_others(file, tmp_path, capsys, monkeypatch):
    run, calls = sweep.train.run, []

    def fails_once(*given):
        calls.append(given)
        if len(calls) == 1:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return run(*given)

    monkeypatch.setattr(sweep.train, "run", fails_once)
    call(f"--config={file}", f"--out={tmp_path}", status=1)
    shown = capsys.readouterr()
    assert "Traceback" in shown.err and "error: " in shown.err
    assert "1 failed" in shown.out and len(calls) > 1


class TestMistakes:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ([], "the following arguments are required: --config"),
            (["--minutes=0"], "argument --minutes: must be a positive number, found 0"),
            (["--minutes=soon"], "argument --minutes: invalid _minutes value: 'soon'"),
            (["--index=2", "--count=2"], "--index must be in 0 to --count - 1, found --index=2"),
            (["--count=0"], "--count=0"),
            (["--dryrun"], "unrecognized arguments: --dryrun"),
            (["--xla_profile=cpu"], "unknown XLA profile 'cpu'"),
        ],
    )
    def test_in_flags(self, arguments, words, file, capsys):
        call(*([f"--config={file}", *arguments] if arguments else []), status=2)
        assert words in capsys.readouterr().err.splitlines()[-1]

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            ("import ipwd_jaxx", "No module named 'ipwd_jaxx'"),
            ("def get_config(): pass", "has no function get_runs"),
            ("def get_runs(): return {}['a']", "get_runs() of FILE fails: KeyError: 'a'"),
            ("def get_runs(): return []", "returns no runs"),
            ("def get_runs(): return [3]", "must return mappings with a config"),
            ("def get_runs(): return [{'config': C, 'seed': 1}]", "found the keys ['seed']"),
            ("def get_runs(): return [{'config': {}}]", "does not start from default(): {}"),
            ("def get_runs(): return [{'config': C}]", "a run without config.name"),
            ("C.name = 'a'\ndef get_runs(): return 2 * [{'config': C}]", "runs have the folder"),
            (
                "C.update(name='a', seeds=(1, 2))\n"
                "def get_runs(): return [{'config': C, 'seeds': (1,)}]",
                "the run a has the seeds (1,), and its config has the seeds (1, 2)",
            ),
            (
                "C.name = 'a'\ndef get_runs(): return [{'config': C, 'seeds': 5}]",
                "the seeds of the run a of FILE must be a tuple",
            ),
            (
                "C.name = 'a'\ndef get_runs(): return [{'config': C, 'seeds': (0, -1)}]",
                "4294967295; found (0, -1)",
            ),
            (
                "C.name, C.model.name = 'a', 'resnet9'\ndef get_runs(): return [{'config': C}]",
                "the run a of FILE: unknown network 'resnet9'",
            ),
        ],
    )
    def test_in_a_file(self, body, words, file, capsys):
        file.write_text(f"from ipwd_jax.config import default\nC = default()\n{body}\n")
        call(f"--config={file}", status=2)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and words.replace("FILE", str(file)) in line

    def test_in_the_command(self):
        process = start("--config=nope.py")
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 2 and "Traceback" not in errors
        assert errors.startswith("error: the config file nope.py cannot be run: FileNotFoundError")


class TestFiles:
    @pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
    def test_every_run_is_valid(self, path, capsys):
        runs = sweep.load_runs(str(path))
        for run in runs[:: 1 + len(runs) // 50]:  # evenly over those of the paper, which are many
            validate.validate(run["config"])
        assert not capsys.readouterr().err  # no setting is without effect
        assert sweep.plan(runs, "runs")
        assert f"--config=configs/sweeps/{path.name}" in module_of(path).__doc__

    def test_arms_of_the_ratio(self):
        path = ROOT / "configs" / "sweeps" / "ratio_small.py"
        runs = sweep.load_runs(f"{path}:2.5,3")
        configs = [run["config"] for run in runs if run["seeds"] == (0,)]
        constant = ("kd_times2.5", "kd_times3", "kd_cls_times2.5", "kd_cls_times3")
        others = ("ipwd_A_raw", "ipwd_B_raw", "wsld", "ipwd_A_detached", "wsld_times0.81")
        names = ("ipwd_A", "kd", "ce", "kd_cls", *constant, "ipwd_B", *others)
        pairs = ("vgg8_resnet8" if name != "ce" else "resnet8" for name in names)
        expected = [f"cifar100_{n}_{p}" for n, p in zip(names, pairs, strict=True)]
        assert [config.name for config in configs] == expected
        assert [run["seeds"] for run in runs] == [
            (seed,)
            for seeds in ((0, 1), (2,))
            for count in (9, 5)
            for seed in seeds
            for _ in range(count)
        ]
        assert [config.weighting.constant for config in configs[4:8]] == [2.5, 3.0] * 2
        for config in configs:
            assert config.epochs == 20
            assert not config.teacher.name or config.teacher.pretrained in teachers.names()
            weights = {name: weight for name, weight in config.loss.items() if weight}
            if config.weighting.name == "ipwd" or "kd_cls" in config.name:
                assert weights == {"ce": 0.1, "kd": 0.9, "cls": 1.0}
        with pytest.raises(sweep.UserError, match="takes numbers after the colon, found 'two'"):
            sweep.load_runs(f"{path}:two")

    def test_arms_of_the_ratio_with_the_recipe_of_the_paper(self):
        folder, method = ROOT / "configs", {"ipwd_A": "ipwd", "kd": "kd", "ce": "ce"}
        runs = sweep.load_runs(str(folder / "sweeps" / "ratio_paper.py"))
        configs = {run["config"].name: run["config"].to_dict() for run in runs}
        for name in method:
            pair = "resnet8x4" if name == "ce" else "resnet32x4_resnet8x4"
            arm = configs[f"cifar100_{name}_{pair}"]
            recipe = folder / f"cifar_baselines.py:{method[name]},resnet32x4,resnet8x4"
            paper = api.load_config(recipe, data__download=True).to_dict()
            assert arm | {"name": ""} == paper | {"name": ""}

    @pytest.mark.parametrize(
        ("file", "folder"),
        [
            ("ratio_small", "ratio"),
            ("ratio_long_tail", "long_tail"),
            ("ratio_validation", "ratio_validation"),
        ],
    )
    def test_stored_runs_are_not_trained_again(self, file, folder, tmp_path):
        stored = ROOT / "docs" / "results" / folder
        out = shutil.copytree(stored, tmp_path / folder)
        runs = sweep.plan(sweep.load_runs(str(ROOT / f"configs/sweeps/{file}.py")), out)
        found = {run.workdir.name for run in runs if run.state() == sweep.FINISHED}
        assert found == {path.parent.name for path in stored.glob("*/result.json")}
        failed = {path.parent.name for path in stored.glob("*/failed.json")}
        assert found | failed == {path.name for path in stored.iterdir()}

    def test_the_array_script_passes_its_index_on(self, file, tmp_path):
        script = ROOT / "examples" / "slurm_array.sh"
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
        srun = tmp_path / "srun"
        srun.write_text('#!/bin/sh\nexec "$@" --dry_run\n')
        srun.chmod(0o755)
        folders = os.pathsep.join([str(tmp_path), str(sys.prefix) + "/bin", os.environ["PATH"]])
        slurm = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3", "PATH": folders}
        done = subprocess.run(
            ["bash", script, file, tmp_path / "runs"],
            cwd=ROOT,
            env=os.environ | slurm,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout == f"Run 1 of 1: {tmp_path / 'runs' / 'kd_seed1'}: not begun\n"

    def test_the_search_chooses_on_images_that_are_held_out(self, tmp_path):
        pytest.importorskip("optuna", reason="the search needs Optuna: pip install optuna")
        example = module_of(ROOT / "examples" / "optuna_search.py")
        changes = {"epochs": 1, "teacher__epochs": 1}
        study = example.search(tmp_path, 2, "tiny_net,tiny_net", **changes)
        assert len(study.trials) == 2 and study.best_value == max(t.value for t in study.trials)
        for trial in study.trials:
            run = load_run(tmp_path / f"trial{trial.number}")
            assert run.result["last"]["top1"] == trial.value
            assert run.config.loss.kd == trial.params["kd"]
            assert run.config.optimizer.learning_rate == trial.params["learning_rate"]
            assert len(run.predictions()["labels"]) < 360  # the test set of the digits
        with mock.patch.object(Loop, "train", side_effect=AssertionError):  # finished trials stay
            again = example.search(tmp_path, 2, "tiny_net,tiny_net", **changes)
        assert [t.value for t in again.trials] == [t.value for t in study.trials]
