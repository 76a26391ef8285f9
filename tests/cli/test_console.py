"""The only door to stdout: every byte goes through it, however little the stream takes at a time."""

import io
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

from hsivi_cli.cli import console
from hsivi_cli.cli.app import main
from hsivi_cli.errors import RunError


def test_all_bytes_arrive_when_a_stream_takes_a_part(monkeypatch):
    class Short(io.BytesIO):
        def write(self, data):
            return super().write(bytes(data[:3]))

    stream = Short()
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(buffer=stream))
    for data in (b"abcdefgh", memoryview(b"ijklm"), b""):
        console.result_bytes(data)
    assert stream.getvalue() == b"abcdefghijklm"


def test_a_closed_stdout_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    for print_result in (
        lambda: console.result_line("x"),
        lambda: console.result_json({}),
        lambda: console.result_bytes(b"x"),
        lambda: console.result_table("x", [("a", "b")]),
    ):
        with pytest.raises(RunError, match="stdout is closed"):
            print_result()


def test_warnings_of_our_own_modules_are_told_as_any_other_once_each(capsys, recwarn):
    ours = str(Path(console.__file__).parent.parent / "kernels" / "agreement.py")
    before = warnings.showwarning
    with console.told_warnings():
        for text in ("it fails\nits check", "it fails its check", "and another"):
            warnings.warn_explicit(text, UserWarning, ours, 1)
        warnings.warn_explicit("of torch", UserWarning, "/elsewhere/torch.py", 1)
        warnings.warn_explicit("old", FutureWarning, ours, 2)
    assert capsys.readouterr().err == "warning: it fails its check\nwarning: and another\n"
    assert "of torch" in [str(warning.message) for warning in recwarn]
    assert warnings.showwarning is before


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_early_is_noticed(unbuffered):
    """With PYTHONUNBUFFERED a write takes what the pipe holds and says so: the rest must not be dropped in silence."""
    script = textwrap.dedent(
        """
        import sys
        from hsivi_cli.cli import app, console
        app.app.command("flood")(lambda: console.result_bytes(bytes(400_000)))  # six times what a pipe holds
        sys.exit(app.main(["flood"]))
        """
    )
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes) as process:
        assert process.stdout.read1(1)
        process.stdout.close()
        story = process.stderr.read()
    assert (process.returncode, story) == (1, b"")


def test_a_closed_stdout_is_one_line():
    command = f"{sys.executable} -m hsivi_cli --version >&-"
    done = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: stdout is closed: there is nowhere to print the result\n")


def test_option_errors_name_the_help_of_their_command(capsys):
    assert main(["sample", "--bogus"]) == 2
    assert "hsivi sample --help" in capsys.readouterr().err
    assert main(["sampel"]) == 2
    assert "'hsivi --help'" in capsys.readouterr().err


def test_an_internal_error_keeps_its_traceback_and_says_what_it_is(monkeypatch, capsys):
    def broken(*_):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("hsivi_cli.methods.describe.describe", broken)
    assert main(["inspect", "x"]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError: oh" in err
    assert "bug in hsivi" in err.splitlines()[-1]


def test_names_that_look_like_emoji_are_left_as_they_are(capsys):
    console.error("my_net.py:boom: failed")
    assert "my_net.py:boom: failed" in capsys.readouterr().err
