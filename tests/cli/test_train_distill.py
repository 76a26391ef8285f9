"""The main job as a user runs it, small: train on the 8x8 digits, distil, stop and resume, and every wrong turn."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from hsivi_cli.cli.app import main
from hsivi_cli.errors import InputError
from hsivi_cli.io.run_directory import checkpoints

TRAIN = ["train", "--data", "digits", "--steps", "6", "--batch", "8", "--channels", "16,32", "--warmup", "2"]
DISTILL = ["--nfe", "2,3", "--steps", "4", "--batch", "8", "--critic-steps", "2", "--preview-every", "2"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("train") / "teacher"
    assert main([*TRAIN, "--out", str(path), "--preview-every", "3"]) == 0
    return path


def test_teacher_opens_in_diffusers(teacher):
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline.from_pretrained(teacher)
    assert pipeline.unet.config.sample_size == 8
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert (teacher / "samples-000006.png").is_file()
    assert (teacher / "curves.png").is_file()


def test_training_resumes_bit_exactly_and_refuses_other_options(teacher, tmp_path, capsys):
    from hsivi_cli.engine import loop

    stopped = tmp_path / "stopped"
    original = loop.keep_checkpoint

    def stop(directory, tree, step, *rest):
        original(directory, tree, step, *rest)
        if step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "keep_checkpoint", stop)
        patch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        assert main([*TRAIN, "--out", str(stopped), "--preview-every", "3"]) == 130
    assert not (stopped / "unet").exists()
    assert main([*TRAIN, "--out", str(stopped)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*TRAIN, "--out", str(stopped), "--lr", "0.5", "--resume"]) == 2
    assert "lr" in capsys.readouterr().err
    assert main([*TRAIN, "--out", str(stopped), "--preview-every", "3", "--resume"]) == 0
    ours, straight = (load_file(p / "unet/diffusion_pytorch_model.safetensors") for p in (stopped, teacher))
    assert all(torch.equal(ours[name], straight[name]) for name in straight)


def test_train_answers_in_json(tmp_path, capsys):
    from hsivi_cli.targets.score_net import load_score_net

    out = tmp_path / "t"
    assert main([*TRAIN, "--preview-every", "0", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    teacher = load_score_net(out)
    assert (result["out"], result["steps"], result["sha256"]) == (str(out), 6, teacher.sha256)
    assert result["parameters"] == sum(p.numel() for p in teacher.unet.parameters())
    assert result["loss"] == json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["loss"] > 0
    assert result["seconds"] > 0


def test_distill_writes_students_that_diffusers_opens(teacher, tmp_path, capsys):
    from diffusers import UNet2DModel

    run = tmp_path / "run"
    capsys.readouterr()
    assert main(["distill", "--score-net", str(teacher), "--out", str(run), *DISTILL, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [p.rsplit("/", 1)[1] for p in result["students"]] == ["nfe2", "nfe3"]
    assert UNet2DModel.from_pretrained(run / "nfe2" / "unet").config.sample_size == 8
    fields = json.loads((run / "nfe3" / "hsivi.json").read_text())
    assert (fields["nfe"], fields["step"], len(fields["grid"])) == (3, 4, 4)
    work = run / "training" / "nfe3"
    assert (work / "samples-000002.png").is_file()
    assert (work / "curves.png").is_file()
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4
    assert main(["sample", str(run), "--nfe", "2", "-n", "3", "--out", str(tmp_path / "x.npy")]) == 0
    assert main(["sample", str(run), "--nfe", "7", "-n", "3", "--out", str(tmp_path / "y.npy")]) == 2
    assert "2, 3" in capsys.readouterr().err


def test_distill_resumes_bit_exactly_after_a_kill(teacher, tmp_path):
    from hsivi_cli.engine import loop

    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    arguments = ["distill", "--score-net", str(teacher), *DISTILL]
    assert main([*arguments, "--out", str(straight)]) == 0
    original = loop.keep_checkpoint

    def crash(directory, tree, step, *rest):
        original(directory, tree, step, *rest)
        if (directory.name, step) == ("nfe3", 2):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "keep_checkpoint", crash)
        patch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        assert main([*arguments, "--out", str(stopped)]) == 130
    assert main([*arguments, "--out", str(stopped), "--resume"]) == 0
    for k in (2, 3):
        for name in ("unet/diffusion_pytorch_model.safetensors", "log_gamma.safetensors"):
            ours, theirs = load_file(stopped / f"nfe{k}" / name), load_file(straight / f"nfe{k}" / name)
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs), (k, name)


@pytest.mark.parametrize("objective", ["sm", "diffused-fisher", "diffused-kl"])
def test_dry_run_reports_and_writes_nothing(teacher, tmp_path, capsys, objective):
    capsys.readouterr()
    arguments = ["distill", "--score-net", str(teacher), "--nfe", "3", "--batch", "8", "--objective", objective]
    assert main([*arguments, "--out", str(tmp_path / "run"), "--dry-run", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["dry_run"]
    assert report["seconds_per_step"] > 0
    assert report["memory_bytes"] > 0
    assert report["critic_steps"] == (20 if objective == "sm" else 5)
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_before_it_measures_that_it_does(teacher, capsys, monkeypatch):
    from hsivi_cli.methods import distillation

    def measure(*arguments):
        assert "NFE 2: timing a step of --batch 9" in capsys.readouterr().err
        raise InputError("measured")

    monkeypatch.setattr(distillation, "dry_run", measure)
    assert main(["distill", "--score-net", str(teacher), "--nfe", "2", "--batch", "9", "--dry-run"]) == 2
    assert "measured" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--batch", "--rollout"])
def test_a_step_that_cannot_fit_memory_is_refused_before_anything_is_made(teacher, tmp_path, capsys, monkeypatch, flag):
    from hsivi_cli.methods import distillation

    def measure(*arguments):
        raise AssertionError("measured")

    monkeypatch.setattr(distillation, "dry_run", measure)
    capsys.readouterr()
    out = tmp_path / "run"
    huge = [flag, "999999999999", "--out", str(out)]
    for more in ([], ["--dry-run"]):
        assert main(["distill", "--score-net", str(teacher), "--nfe", "2", *huge, *more]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {flag} 999999999999 takes ")
        assert said.count("\n") == 1
    if flag == "--batch":
        assert main(["train", "--data", "digits", *huge]) == 2
        assert capsys.readouterr().err.startswith("error: --batch 999999999999 takes ")
    assert not out.exists()


def test_warm_start_goes_from_the_larger_nfe_to_the_smaller(teacher, tmp_path):
    run = tmp_path / "run"
    assert main(["distill", "--score-net", str(teacher), "--out", str(run), *DISTILL, "--warm-start"]) == 0
    started = {k: json.loads((run / f"nfe{k}" / "hsivi.json").read_text())["started_from"] for k in (2, 3)}
    assert started == {3: "teacher", 2: str(run / "nfe3")}


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--score-net", "nowhere"], "nowhere does not exist"),
        (["--nfe", "ten"], "--nfe"),
        (["--nfe", "0"], "--nfe 0"),
        (["--nfe", "5,5"], "repeats"),
        (["--grid", "0,5"], "--grid"),
        (["--objective", "gan"], "--objective"),
        (["--log-gamma", "pixel"], "--log-gamma"),
        (["--precision", "fp8"], "--precision"),
        (["--lr-schedule", "step"], "--lr-schedule"),
        (["--device", "cuda:99"], "--device"),
        (["--init-from", "nowhere"], "nowhere"),
        (["--reference", "nowhere"], "nowhere"),
        (["--nfe", "5000"], "--nfe 5000"),
        (["--eta", "0"], "--eta"),
        (["--clip", "0"], "--clip"),
    ],
)
def test_bad_options_end_with_one_line_and_leave_nothing(teacher, tmp_path, capsys, arguments, what):
    out = tmp_path / "run"
    base = ["distill", "--out", str(out), "--nfe", "3", "--steps", "1"]
    base += [] if "--score-net" in arguments else ["--score-net", str(teacher)]
    assert main([*base, *arguments]) == 2
    captured = capsys.readouterr()
    assert what in captured.err
    assert captured.err.strip().count("\n") == 0
    assert captured.out == ""
    assert not out.exists()


def test_dry_run_checks_everything_a_run_would(teacher, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    base = ["distill", "--score-net", str(teacher), "--nfe", "3", "--batch", "4", "--dry-run"]
    for wrong in (["--init-from", "nowhere"], ["--reference", "nowhere"], ["--out", str(tmp_path / "full")]):
        assert main([*base, *wrong]) == 2
    capsys.readouterr()


def test_a_student_of_another_network_is_no_start(teacher, tiny_student, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["distill", "--score-net", str(teacher), "--nfe", "2", "--steps", "1", "--out", str(out)]
    assert main([*arguments, "--init-from", str(tiny_student)]) == 2
    assert "architecture" in capsys.readouterr().err
    assert not out.exists()


def test_resume_names_the_option_that_changed(teacher, tmp_path, capsys):
    arguments = ["distill", "--score-net", str(teacher), "--nfe", "2", "--steps", "1", "--batch", "4"]
    arguments += ["--critic-steps", "1", "--preview-every", "0", "--out", str(tmp_path / "run")]
    assert main(arguments) == 0
    assert main([*arguments, "--lr", "0.5", "--resume"]) == 2
    assert "--lr was 0.0001, now 0.5" in capsys.readouterr().err
    arguments[arguments.index("--nfe") + 1] = "2,3"
    assert main([*arguments, "--resume", "--no-rollout-cache"]) == 2
    assert "--nfe was 2, now 2,3; --rollout-cache was True, now False" in capsys.readouterr().err
    arguments[arguments.index("--nfe") + 1] = "2"
    assert main([*arguments, "--resume", "--grid", "0,100,700"]) == 2
    assert "--grid was [0, 200, 800], now [0, 100, 700]" in capsys.readouterr().err


def test_resume_says_that_the_teacher_or_the_data_changed(teacher, tmp_path, capsys):
    run = tmp_path / "run"
    plan = json.loads((teacher / "config.json").read_text())
    changed = plan | {"data": plan["data"] | {"sha256": "0"}, "unet": plan["unet"] | {"layers_per_block": 9}}
    shutil.copytree(teacher, run)
    (run / "config.json").write_text(json.dumps(changed))
    assert main([*TRAIN, "--out", str(run), "--resume", "--channels", "16"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    told = "the images of --data are not those it was begun with; --channels was [16, 32], now [16]; --blocks was 9"
    assert told in line
    shutil.rmtree(run)
    arguments = ["distill", "--score-net", str(teacher), "--nfe", "2", "--steps", "1", "--batch", "4"]
    arguments += ["--critic-steps", "1", "--preview-every", "0", "--out", str(run)]
    assert main(arguments) == 0
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"teacher_sha256": "0"}))
    capsys.readouterr()
    assert main([*arguments, "--resume"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "the teacher is not what it was: --score-net's weights, its schedule or --network's file changed" in line
    assert line.endswith(": name the first ones, or choose another --out")


def test_resume_clears_what_a_kill_left_behind(teacher, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["distill", "--score-net", str(teacher), "--nfe", "2", "--steps", "1", "--batch", "4"]
    arguments += ["--critic-steps", "1", "--preview-every", "0", "--out", str(run)]
    assert main(arguments) == 0
    shutil.copytree(run / "nfe2", run / ".nfe2.deadbeef.tmp")  # killed while writing
    assert main(["sample", str(run), "-n", "1", "--out", str(tmp_path / "a.npy")]) == 0
    (run / "nfe2").rename(run / ".nfe2.deadbeef.tmp.old")  # killed between the two renames
    assert main([*arguments, "--resume"]) == 0
    assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
    assert main(["sample", str(run), "-n", "1", "--out", str(tmp_path / "b.npy")]) == 0


def test_first_checkpoint_not_reached_starts_over_without_double_lines(teacher, tmp_path):
    run = tmp_path / "run"
    arguments = ["distill", "--score-net", str(teacher), "--nfe", "2", "--steps", "2", "--batch", "4"]
    arguments += ["--critic-steps", "1", "--preview-every", "0", "--out", str(run)]
    assert main(arguments) == 0
    work = run / "training" / "nfe2"
    for path in checkpoints(work):
        path.unlink()
    with (work / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "fi')
    assert main([*arguments, "--resume"]) == 0
    assert [json.loads(line)["step"] for line in (work / "metrics.jsonl").read_text().splitlines()] == [2]


def test_a_teacher_that_changed_is_not_resumed(teacher, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    run = tmp_path / "run"
    arguments = ["distill", "--out", str(run), "--nfe", "2", "--steps", "1", "--batch", "4", "--preview-every", "0"]
    assert main([*arguments, "--score-net", str(teacher)]) == 0
    config = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(config | {"beta_end": 0.03}))
    assert main([*arguments, "--score-net", str(other), "--resume"]) == 2
    assert "the teacher is not what it was" in capsys.readouterr().err


def test_training_data_that_does_not_fit(tmp_path, capsys):
    assert main(["train", "--data", "digits", "--channels", "8,8,8,8,8", "--out", str(tmp_path / "t")]) == 2
    assert "--channels" in capsys.readouterr().err
    assert main(["train", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "t")]) == 2
    assert not (tmp_path / "t").exists()


def test_a_damaged_trained_network_is_refused_in_one_line(teacher, tmp_path, capsys):
    path = shutil.copytree(teacher, tmp_path / "teacher")
    weights = path / "unet/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4] ^= 1  # the last bit of a number: what is left is finite, and fits
    weights.write_bytes(data)
    for command in (
        ["inspect"],
        ["sample", "--solver", "ddim", "--nfe", "2", "-n", "1", "--out", str(tmp_path / "a.npy")],
    ):
        capsys.readouterr()
        assert main([command[0], str(path), *command[1:]]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{weights} is damaged: it is not what SHA256SUMS beside it says" in line


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--channels", "0"], "--channels"),
        (["--channels", "-16,32"], "--channels"),
        (["--channels", "4,4", "--attention"], "--attention"),
        (["--blocks", "9999"], "--blocks"),
        (["--lr", "inf"], "--lr"),
        (["--threads", "99999999"], "--threads"),
    ],
)
def test_impossible_networks_are_refused_before_anything_is_written(tmp_path, capsys, arguments, what):
    out = tmp_path / "t"
    assert main(["train", "--data", "digits", "--out", str(out), *arguments]) == 2
    assert what in capsys.readouterr().err
    assert not out.exists()


def test_a_first_run_that_fails_does_not_block_the_next(teacher, tmp_path, capsys):
    """Diverged, or out of disk before the first checkpoint: the same command (or with a lower --lr) works again."""
    import errno

    from hsivi_cli.engine import loop
    from hsivi_cli.io import samples

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    distil = ["distill", "--score-net", str(teacher), "--nfe", "2", "--steps", "6", "--batch", "4", "--warmup", "0"]
    train = [*TRAIN, "--warmup", "0"]
    for command in ([*distil, "--critic-steps", "1", "--preview-every", "2"], [*train, "--preview-every", "2"]):
        out = tmp_path / command[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "append_metrics", full)
            assert main([*command, "--preview-every", "0", "--out", str(out)]) == 1
        assert "disk is full" in capsys.readouterr().err
        assert not out.exists()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(samples, "png_bytes", full)
            assert main([*command, "--out", str(out)]) == 1
        assert "disk is full" in capsys.readouterr().err
        assert not out.exists()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.math, "isfinite", lambda value: False)
            assert main([*command, "--out", str(out)]) == 1
        assert capsys.readouterr().err.strip().endswith("use a lower --lr")
        assert not out.exists()
        assert main([*command, "--out", str(out)]) == 0


def test_a_late_failure_keeps_the_run_and_says_how_to_go_on(teacher, tmp_path, capsys):
    from hsivi_cli.engine import loop

    command = ["distill", "--score-net", str(teacher), "--nfe", "2", "--steps", "9", "--batch", "4"]
    command += ["--critic-steps", "1", "--preview-every", "1", "--out", str(tmp_path / "run")]
    with pytest.MonkeyPatch.context() as patch:
        whole, calls = loop.append_metrics, []
        patch.setattr(loop, "append_metrics", lambda *a: calls.append(1) or (whole(*a) if len(calls) < 3 else 1 / 0))
        assert main(command) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert checkpoints(tmp_path / "run" / "training" / "nfe2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.math, "isfinite", lambda value: False)
        assert main([*command, "--resume"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: diverged: critic_loss is ")
    assert ", after 3 roll-backs to lower rates: use a lower --lr; " in line
    assert line.endswith("run is kept: --resume goes on with it, another --out starts afresh")
    assert main([*command, "--resume"]) == 0


def test_two_processes_cannot_write_one_run(teacher, tmp_path, capsys):
    from hsivi_cli.io.run_directory import lock_run

    distil = ["distill", "--score-net", str(teacher), "--nfe", "2", "--steps", "1", "--batch", "4"]
    for command in ([*distil, "--critic-steps", "1", "--preview-every", "0"], [*TRAIN, "--preview-every", "0"]):
        out = tmp_path / command[0]
        assert main([*command, "--out", str(out)]) == 0
        capsys.readouterr()
        with lock_run(out):
            for more in ([], ["--resume"]):
                assert main([*command, "--out", str(out), *more]) == 2
                assert f"in use by process {os.getpid()}" in capsys.readouterr().err
        assert main([*command, "--out", str(out), "--resume"]) == 0


def test_a_recorded_fid_of_the_teacher_survives_more_training(teacher, tmp_path):
    from hsivi_cli.methods.student import load_student, record_teacher_fid
    from hsivi_cli.targets.score_net import load_score_net

    run = tmp_path / "run"
    command = ["distill", "--score-net", str(teacher), "--nfe", "2", "--steps", "2", "--batch", "4"]
    command += ["--critic-steps", "1", "--preview-every", "1", "--out", str(run)]
    assert main(command) == 0
    fields = {"value": 1.5, "n": 10, "solver": "ddpm", "nfe": 1000, "reference_sha256": "a", "extractor_sha256": "b"}
    fields |= {"teacher_sha256": load_score_net(teacher).sha256}
    record_teacher_fid(run / "nfe2", fields)
    for path in checkpoints(run / "training" / "nfe2"):
        path.unlink()
    assert main([*command, "--resume"]) == 0
    assert load_student(run / "nfe2").description["teacher_fid"] == fields
