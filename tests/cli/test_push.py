"""`hsivi push`: what reaches huggingface_hub, and what a user is told without login or network. Nothing is sent."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from diffusers import DiffusionPipeline
from huggingface_hub import errors

from hsivi_cli.cli.app import main
from hsivi_cli.io.files import asset
from hsivi_cli.methods.publish import without_folders
from hsivi_cli.methods.student import student_sha256


class Url(str):
    repo_id = "me/digits"


class FakeApi:
    """The calls that reach the hub's API, and a copy of the folder that would be uploaded."""

    calls: list[tuple[str, dict]]
    copied: Path

    def whoami(self):
        self.calls.append(("whoami", {}))
        return {"name": "me"}

    def create_repo(self, repo_id, **fields):
        self.calls.append(("create_repo", {"repo_id": repo_id} | fields))
        return Url(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, folder_path, **fields):
        self.calls.append(("upload_folder", fields))
        shutil.copytree(folder_path, self.copied)
        return SimpleNamespace(commit_url="https://huggingface.co/me/digits/commit/1")


@pytest.fixture
def api(monkeypatch, tmp_path):
    class Api(FakeApi):
        calls = []  # noqa: RUF012
        copied = tmp_path / "uploaded"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return Api


def run(capsys, *arguments):
    code = main(["push", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_student_is_uploaded_with_a_card(api, capsys):
    path = asset("mnist/nfe5")
    code, stdout, _ = run(capsys, path, "me/digits", "--private")
    assert (code, stdout) == (0, "https://huggingface.co/me/digits\n")
    assert [name for name, _ in api.calls] == ["whoami", "create_repo", "upload_folder"]
    assert api.calls[1][1] == {"repo_id": "me/digits", "private": True, "exist_ok": True}
    assert api.calls[2][1]["repo_id"] == "me/digits"
    assert student_sha256(api.copied) == student_sha256(path)
    card = (api.copied / "README.md").read_text()
    description = json.loads((path / "hsivi.json").read_text())
    for said in (
        "NFE",
        "0 32 128 288 512 800",
        description["teacher_sha256"],
        "library_name: diffusers",
        "FID of the teacher",
    ):
        assert said in card, said
    assert f"{description['teacher_fid']['value']:.4g} on 2000 samples, by ddpm at NFE 1000" in card
    # what the card says, word for word but for the name
    pipe = DiffusionPipeline.from_pretrained(api.copied)
    assert type(pipe).__name__ == "HSIVIPipeline"


def test_a_run_needs_its_nfe_and_json_says_where(api, tiny_run, capsys):
    code, _, stderr = run(capsys, tiny_run, "me/digits")
    assert code == 2
    assert "choose one with --nfe" in stderr
    code, stdout, _ = run(capsys, tiny_run, "me/digits", "--nfe", 3, "--json")
    assert code == 0
    assert json.loads(stdout)["commit"].endswith("/commit/1")
    assert api.calls[1][1]["private"] is None


def test_a_dry_run_sends_nothing(api, tiny_student, capsys):
    code, stdout, stderr = run(capsys, tiny_student, "me/digits", "--dry-run")
    assert code == 0
    assert stdout.startswith("---\nlibrary_name: diffusers")
    assert "model_index.json" in stderr
    assert not api.calls


def test_paths_of_this_machine_stay_here(api, tiny_student, tmp_path, capsys):
    path = tmp_path / "s"
    shutil.copytree(tiny_student, path)
    fields = json.loads((path / "hsivi.json").read_text()) | {
        "teacher": "/home/me/secret/teacher",
        "recipe": {"x": ["/a/b"]},
    }
    (path / "hsivi.json").write_text(json.dumps(fields))
    assert run(capsys, path, "me/digits")[0] == 0
    written = json.loads((api.copied / "hsivi.json").read_text())
    assert written["teacher"] == "teacher"
    assert written["recipe"] == {"x": ["b"]}
    assert "secret" not in (api.copied / "README.md").read_text()
    assert without_folders({"eta": 0.2, "grid": [0, 1], "name": "a/b"}) == {"eta": 0.2, "grid": [0, 1], "name": "a/b"}


class ConnectError(Exception):
    """As the name of an HTTP client's."""


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (errors.LocalTokenNotFoundError("no token"), "hf auth login"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (errors.HFValidationError("Repo id must be"), "OWNER/NAME"),
        (ConnectError("[Errno -2] Name or service not known"), "cannot be reached"),
        (TimeoutError(), "cannot be reached"),
    ],
)
def test_what_stands_in_the_way_is_one_line(api, monkeypatch, tiny_student, capsys, error, what):
    def fail(self):
        raise error

    monkeypatch.setattr(api, "whoami", fail)
    code, stdout, stderr = run(capsys, tiny_student, "me/digits")
    assert (code, stdout) == (2, "")
    assert what in stderr.splitlines()[-1]
    assert not api.calls


def test_a_refusal(api, monkeypatch, tiny_student, capsys):
    def fail(self, repo_id, **fields):
        error = errors.HfHubHTTPError.__new__(errors.HfHubHTTPError)
        Exception.__init__(error, "403 Forbidden: you don't have the rights")
        error.response = SimpleNamespace(status_code=403)
        raise error

    monkeypatch.setattr(api, "create_repo", fail)
    code, _, stderr = run(capsys, tiny_student, "me/digits")
    assert code == 2
    assert "403 Forbidden" in stderr
    assert "a token that may write" in stderr


def test_without_a_login_it_says_so(monkeypatch, tiny_student, capsys, tmp_path):
    """The library itself, on a machine with neither token nor network."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    code, _, stderr = run(capsys, tiny_student, "me/digits")
    assert code == 2
    assert "hf auth login" in stderr or "HF_HUB_OFFLINE" in stderr


def test_a_name_that_the_hub_refuses_is_refused_before(tiny_student, capsys):
    assert main(["push", str(tiny_student), "badname!/x/y", "--dry-run"]) == 2
    assert "me/five-steps" in capsys.readouterr().err
