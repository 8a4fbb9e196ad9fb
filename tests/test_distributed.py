"""Several processes that train together give the results of one process with as many devices."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from data_helpers import write_two_classes
from helpers import module_of

from ipwd_jax import data, parallel, sweep, train
from ipwd_jax.assemble import assemble
from ipwd_jax.errors import UserError

TESTS = Path(__file__).parent
ROOT = TESTS.parent
CONFIG = TESTS / "distributed_config.py"
LONG = ("--config.epochs=2000", "--config.checkpoint.every_seconds=1.0")


class Run:
    """A run on the command line, of one process or of several on this machine."""

    def __init__(
        self, kind, workdir, processes=1, devices=1, options=(), lacking=None, **variables
    ):
        """Start the run; the process `lacking` does not get the environment `variables`."""
        port = free_port()
        command = [sys.executable, "-m", "ipwd_jax.main", f"--config={CONFIG}:{kind}"]
        command += [f"--workdir={workdir}", *options]
        if processes > 1:
            command += ["--distributed", f"--coordinator=localhost:{port}"]
            command += [f"--num_processes={processes}"]
        self.workdir = workdir
        self.processes = [
            subprocess.Popen(
                [*command, *([f"--process_id={i}"] if processes > 1 else [])],
                cwd=ROOT,
                env=environment_of(devices) | ({} if i == lacking else variables),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(processes)
        ]

    def ends(self, *statuses, timeout=300):
        """Check the statuses of the processes, and return what each has printed."""
        said = []
        for process, status in zip(self.processes, statuses, strict=True):
            out, err = process.communicate(timeout=timeout)
            assert process.returncode == status, (out, err)
            said.append((re.sub(r".*peer ranks.*\n", "", out), err))  # printed by JAX on CPUs
        return said

    def after_checkpoints(self, count, above=0):
        """Wait until the run has so many checkpoints with numbers above `above`."""
        deadline = time.monotonic() + 120
        while len([number for number in saved(self.workdir) if number > above]) < count:
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in self.processes), self.ends(0, 0)
            time.sleep(0.05)


def environment_of(devices):
    # Without NPROC, the collectives of virtual devices can deadlock with few cores.
    ours = {"NPROC": "8", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(TESTS)}
    return os.environ | ours


def free_port(first=0):
    """Return a port that is free, from `first` on."""
    with socket.socket() as free:
        while True:
            try:
                free.bind(("localhost", first))
                return free.getsockname()[1]
            except OSError:
                first += 1


def saved(workdir):
    return sorted(int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdigit())


def arrays(workdir):
    """Return all arrays of the newest checkpoint, by their paths."""
    folder, found = workdir / "checkpoints" / str(saved(workdir)[-1]), {}
    for item in ("last", "best", "state"):
        reader = ocp.PyTreeCheckpointer()
        tree = reader.metadata(folder / item).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = reader.restore(folder / item, restore_args=as_numpy)
        for path, array in jax.tree_util.tree_leaves_with_path(restored):
            found[item + jax.tree_util.keystr(path)] = array
    return found


def assert_equal(workdir, other, tolerance=2e-5):
    found, expected = arrays(workdir), arrays(other)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(np.abs(value).max(initial=0), 1e-3)
        np.testing.assert_allclose(found[name] / scale, value / scale, atol=tolerance, err_msg=name)


def test_two_processes_are_like_two_devices(tmp_path):
    both = Run("plain", tmp_path / "both", processes=2)
    one = Run("plain", tmp_path / "one", devices=2)
    (first, warned), second = both.ends(0, 0)
    ((alone, _),) = one.ends(0)
    assert_equal(both.workdir, one.workdir)
    assert second == ("", "") and not warned
    assert first.replace("both", "one").splitlines()[:6] == alone.splitlines()[:6]
    files = {path.name for path in both.workdir.iterdir()}
    assert files == {path.name for path in one.workdir.iterdir()}
    assert len(list((both.workdir / "tensorboard").iterdir())) == 1
    # One process alone goes on.
    config = module_of(CONFIG).get_config("plain")
    config.epochs = 3
    train.run(config, both.workdir, extend=True)
    assert saved(both.workdir) == [20, 30]
    train.run(config, tmp_path / "whole")
    assert_equal(both.workdir, tmp_path / "whole", tolerance=1e-3)


def test_each_process_feeds_its_own_devices(tmp_path):
    """Of the streamed images, a process reads those of its own devices only."""
    write_two_classes(tmp_path)
    with mock.patch.dict(os.environ, IMAGES=str(tmp_path)):
        config = module_of(CONFIG).get_config("streamed")
    config.teacher.name, config.loss.kd, config.loss.rkd = "", 0.0, 0.0
    dataset = data.load(config.data)
    experiment, read = assemble(config, dataset, None), []
    records = dataset.train.images.records
    of_files = records.read
    object.__setattr__(records, "read", lambda i: (read.append(i), of_files(i))[1])
    with mock.patch.object(parallel, "device_count", lambda: 4):
        with mock.patch.object(parallel, "own", lambda: slice(None)):
            whole = list(experiment.batches(0, 0))
        read.clear()
        with mock.patch.object(parallel, "own", lambda: slice(1, 3)):
            part = list(experiment.batches(0, 0))
    for of_all, of_some in zip(whole, part, strict=True):
        for array, mine in zip(of_all, of_some, strict=True):
            np.testing.assert_array_equal(mine, array[:, 1:3])
    assert set(read) == {int(i) for index, *_ in part for i in index.ravel()}
    assert len(read) == sum(index.size for index, *_ in part)


def test_a_sweep_is_refused():
    two = mock.patch.object(parallel, "process_count", lambda: 2)
    with two, pytest.raises(UserError, match="cannot share a sweep"):
        sweep.carry_out([])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "processes"),
    [("seeds", 2), ("pskd", 2), ("kd", 2), ("streamed", 2), ("ipwd", 4), ("crd", 4)],
)
def test_all_kinds_of_runs(kind, processes, tmp_path):
    write_two_classes(tmp_path / "images")
    folder = str(tmp_path / "images")
    many = Run(kind, tmp_path / "many" / "run", processes, 4 // processes, IMAGES=folder)
    said = many.ends(*[0] * processes)
    assert said[1:] == [("", "")] * (processes - 1)
    # Both have the same teacher, because students amplify how two of them differ by rounding.
    for teacher in (tmp_path / "many").glob("*tiny_net*"):
        shutil.copytree(teacher, tmp_path / "one" / teacher.name)
    one = Run(kind, tmp_path / "one" / "run", devices=4, IMAGES=folder)
    one.ends(0)
    runs = sorted(
        path.parent.relative_to(tmp_path / "one") for path in tmp_path.glob("one/run*/c*.json")
    )
    assert len(runs) == (2 if kind == "seeds" else 1)
    for run in runs:
        assert_equal(tmp_path / "many" / run, tmp_path / "one" / run)
        files = [{p.name for p in (tmp_path / side / run).glob("*.*")} for side in ("many", "one")]
        assert files[0] == files[1]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_stop_when_one_is_killed(killed, tmp_path):
    run = Run("pskd", tmp_path / "run", 2, options=LONG)
    run.after_checkpoints(2)
    run.processes[killed].kill()
    began = time.monotonic()
    _, err = run.processes[1 - killed].communicate(timeout=100)
    assert run.processes[1 - killed].returncode not in (0, None)
    assert time.monotonic() - began < 90
    assert "has failed. If this is because another one" in err or "another task died" in err
    again = Run("pskd", tmp_path / "run", 2, options=LONG)
    known = saved(tmp_path / "run")
    again.after_checkpoints(1, above=known[-1])
    again.processes[0].send_signal(signal.SIGTERM)
    (first, _), _ = again.ends(143, 143)
    assert f"Resuming at step {known[-1]}" in first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "before", "after"),
    [(signal.SIGTERM, 2, 1), (signal.SIGTERM, 1, 2), (signal.SIGINT, 2, 2)],
)
def test_a_signal_stops_all_and_the_run_resumes(signum, before, after, tmp_path):
    options = ("--config.epochs=60", "--config.checkpoint.every_seconds=0.5")
    run = Run("pskd", tmp_path / "run", before, 2 // before, options=options)
    run.after_checkpoints(1)
    run.processes[-1].send_signal(signum)
    said = run.ends(*[128 + signum] * before)
    stopped_at = saved(tmp_path / "run")[-1]
    assert 0 < stopped_at < 600
    assert f"{signum.name}; the same command resumes" in said[0][1]
    assert said[1:] == [("", "")] * (before - 1)
    again = Run("pskd", tmp_path / "run", after, 2 // after, options=options)
    whole = Run("pskd", tmp_path / "whole", 1, 2, options=options)
    assert f"Resuming at step {stopped_at}" in again.ends(*[0] * after)[0][0]
    whole.ends(0)
    assert_equal(tmp_path / "run", tmp_path / "whole", tolerance=1e-3)


@pytest.mark.slow
def test_mistakes_and_damage(tmp_path):
    # A mistake that all processes find.
    run = Run("plain", tmp_path / "run", 2, options=["--config.loss.at=1.0"])
    assert all(err.startswith("error: ") for _, err in run.ends(2, 2))
    # A folder that another run uses, which the first process alone finds.
    busy = Run("plain", tmp_path / "run", options=LONG)
    busy.after_checkpoints(2)
    for (_, err), start in zip(
        Run("plain", tmp_path / "run", 2, options=LONG).ends(2, 2),
        ("error: another process is using", "error: process 1: another process is using"),
        strict=True,
    ):
        assert err.startswith(start)
    busy.processes[0].send_signal(signal.SIGTERM)
    busy.ends(143)
    # Data that one process alone lacks.
    write_two_classes(tmp_path / "images")
    folder = str(tmp_path / "images")
    run = Run("streamed", tmp_path / "streamed", 2, lacking=1, IMAGES=folder)
    (_, ended), (_, said) = run.ends(-signal.SIGABRT, 2, timeout=150)
    assert said.startswith("error: process 1: ") and "another task died" in ended
    # A damaged checkpoint is set aside by the first process.
    older, newest = saved(tmp_path / "run")
    largest = max((tmp_path / f"run/checkpoints/{newest}/state").rglob("d/*"), key=os.path.getsize)
    os.truncate(largest, os.path.getsize(largest) // 2)
    run = Run("plain", tmp_path / "run", 2, options=LONG)
    run.after_checkpoints(2, above=newest)
    run.processes[1].send_signal(signal.SIGTERM)
    (first, warned), second = run.ends(143, 143)
    assert f"Resuming at step {older}" in first and second == ("", "")
    assert (tmp_path / f"run/checkpoints/damaged-{newest}").is_dir() and "warning" in warned


@pytest.mark.slow
def test_evaluation_and_plans(tmp_path):
    run = Run("plain", tmp_path / "run", 2)
    run.ends(0, 0)
    planned = Run("plain", tmp_path / "other", 2, options=["--dry_run"]).ends(0, 0)
    assert "time     about" in planned[0][0] and planned[1] == ("", "")
    assert not (tmp_path / "other").exists()
    (evaluated, _), second = Run("plain", tmp_path / "run", 2, options=["--mode=eval"]).ends(0, 0)
    assert second == ("", "") and (tmp_path / "run" / "eval.json").exists()
    line = next(line for line in evaluated.splitlines() if line.startswith("top1"))
    assert line.split()[1] == f"{train._result(tmp_path / 'run')['last']['top1']:.3f}"


def launcher(folder, name, variables):
    """Write a program that starts two processes, as a launcher of this name does."""
    script = folder / name
    each = " ".join(f"{key}=$i" for key in variables)
    script.write_text(f"""#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done  # its options
for i in 0 1; do {each} "$@" & pids="$pids $!"; done
for pid in $pids; do wait "$pid" || exit 1; done
""")
    script.chmod(0o755)
    return {"PATH": os.pathsep.join([str(folder), f"{sys.prefix}/bin", os.environ["PATH"]])}


def checked(command, environment):
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_launchers_and_examples(tmp_path):
    """JAX finds the processes in the variables of SLURM and Open MPI; the examples start runs."""
    arguments = [f"--config={CONFIG}:plain", "--config.epochs=1"]
    job = free_port(61440) - 61440  # JAX derives the port of the first process from the job
    of_process = ("SLURM_PROCID", "SLURM_LOCALID")
    environment = environment_of(1) | launcher(tmp_path, "srun", of_process)
    environment |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    script = ["bash", "examples/slurm_nodes.sh", *arguments, f"--workdir={tmp_path / 'slurm'}"]
    said = checked(script, environment | {"SLURM_JOB_ID": str(job)})
    assert "2 x cpu" in said and said.count("Written to") == 1
    job = free_port(61440) - 61440
    of_process = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")
    environment = environment_of(1) | launcher(tmp_path, "mpirun", of_process)
    environment["OMPI_MCA_orte_hnp_uri"] = f"{job * 2**12}.0;tcp://127.0.0.1:1"
    environment["OMPI_COMM_WORLD_SIZE"] = "2"
    command = [sys.executable, "-m", "ipwd_jax.main", "--distributed", *arguments]
    said = checked(["mpirun", *command, f"--workdir={tmp_path / 'mpi'}"], environment)
    assert "2 x cpu" in said and said.count("Written to") == 1
    # The command of the Job, for its first pod alone, with another config and as a dry run.
    python = tmp_path / "python"
    others = f"--num_processes=1 --coordinator=localhost:{free_port()} --dry_run"
    others += f" --config={CONFIG}:plain"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" {others}\n')
    python.chmod(0o755)
    container = kubernetes()["Job"]["spec"]["template"]["spec"]["containers"][0]
    *shell, command = container["command"]
    command = re.sub(r"--config\.data\.\S+", "", command)
    environment = environment_of(1) | {"JOB_COMPLETION_INDEX": "0", "PATH": environment["PATH"]}
    said = checked([*shell, command], environment)
    assert "1 x cpu" in said and "/shared/runs/ipwd" in said


def kubernetes():
    """Return the parts of the Job of Kubernetes by their kind."""
    text = (ROOT / "examples" / "kubernetes_job.yaml").read_text()
    return {part["kind"]: part for part in yaml.safe_load_all(text)}


def test_the_examples_fit_together():
    script = ROOT / "examples" / "slurm_nodes.sh"
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    service, job = kubernetes()["Service"], kubernetes()["Job"]
    name, pods = service["metadata"]["name"], job["spec"]["template"]["spec"]
    assert pods["subdomain"] == name and job["spec"]["completionMode"] == "Indexed"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    command = pods["containers"][0]["command"][-1]
    assert f"--coordinator={job['metadata']['name']}-0.{name}:" in command
    count = int(re.search(r"--num_processes=(\d+)", command)[1])
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == count
    volumes = {volume["name"] for volume in pods["volumes"]}
    assert volumes == {mount["name"] for mount in pods["containers"][0]["volumeMounts"]}
