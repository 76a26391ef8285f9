"""`--network FILE:FUNCTION`: a stranger's network, distilled and drawn from; each mistake is told in one line."""

import io
import json

import numpy as np
import pytest
import torch

from hsivi_cli.cli.app import main
from hsivi_cli.errors import InputError
from hsivi_cli.targets.score_net import NetworkOptions, load_score_net

SHAPE = (1, 8, 8)
GOOD = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Embedding(1000, 1)
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x) * self.scale(t.reshape(-1, 1)).reshape(-1, 1, 1, 1)

def build():
    print("building")
    return Net()
"""


@pytest.fixture
def network(tmp_path):
    """`network(source)`: writes my_net.py, and weights of the good network as a training script would save them."""

    def write(source=GOOD, prefix="module.", save=torch.save, name="weights.pt"):
        (tmp_path / "my_net.py").write_text(source)
        namespace = {}
        exec(GOOD, namespace)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            weights = namespace["build"]().state_dict()
        save({prefix + key: value for key, value in weights.items()}, tmp_path / name)
        return tmp_path / name, f"{tmp_path / 'my_net.py'}:build", weights

    return write


def load(path, build, shape=SHAPE, **schedule):
    return load_score_net(path, options=NetworkOptions(build, shape, schedule))


def test_weights_reach_the_network_whatever_stands_before_their_names(network):
    path, build, weights = network()
    net = load(path, build)
    assert net.shape == SHAPE
    assert all(torch.equal(net.unet.net.state_dict()[key], value) for key, value in weights.items())
    assert any("module." in note for note in net.notes)
    assert any("my_net.py" in note for note in net.notes)
    assert any("assumed" in note for note in net.notes)
    assert not any("assumed" in note for note in load(path, build, beta_schedule="linear").notes)
    x, t = torch.randn(3, *SHAPE), torch.tensor([0, 5, 999])
    torch.testing.assert_close(net.eps(x, 5)[1], net.eps(x, t)[1])


def test_a_wrapper_of_ones_own_may_put_the_network_anywhere(network):
    wrapped = GOOD.replace("return Net()", "net = torch.nn.Module()\n    net.inner = Net()\n    return Wrapped(net)")
    wrapped += """
class Wrapped(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, t):
        return self.net.inner(x, t)
"""
    path, build, weights = network(wrapped)
    found = load(path, build).unet.net.net.inner.state_dict()
    assert all(torch.equal(found[key], value) for key, value in weights.items())


def test_the_hash_names_weights_and_schedule(network):
    path, build, _ = network()
    hashes = {load(path, build).sha256, load(path, build, beta_end=0.03).sha256}
    _, _, weights = network()
    torch.save({key: value + 1 for key, value in weights.items()}, path)
    assert len(hashes | {load(path, build).sha256}) == 3
    assert load(path, build).sha256 == load(path, build).sha256


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("def build(:", "SyntaxError"),
        ("x = 1", "no function build"),
        ("build = 3", "no function build"),
        ("def build(): return 3", "int, not a torch.nn.Module"),
        ("def build(): raise ValueError('no')", "ValueError: no"),
        ("import nothing_like_it", "ModuleNotFoundError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        (GOOD.replace("self.conv(x) *", "self.conv(x)[:, :, 1:] *"), "--shape right"),
        (GOOD.replace("t.reshape(-1, 1)", "t.reshape(7, 1)"), "RuntimeError"),
        (GOOD.replace("return self.conv(x)", "return 3 and {'a': 1} or self.conv(x)"), "dict"),
        (GOOD.replace("return self.conv(x)", "return float('nan') * self.conv(x)"), "NaN or infinity"),
        (GOOD.replace("Conv2d(1, 1, 3", "Conv2d(1, 1, 5"), "does not fit"),
        (GOOD.replace("self.conv =", "self.other ="), "does not fit"),
        ("import torch\ndef build(): return torch.nn.Identity()", "without parameters"),
        (GOOD.replace("def forward", "def state_dict(self): return {}\n\n    def forward"), "none of its weights"),
        (GOOD.replace("self.conv(x)", "self.conv(x.view(2, 1, 8, 8))"), "x of shape .1, 1, 8, 8.* any number"),
        (GOOD.replace("self.conv(x)", "self.conv(x).expand(2, 1, 8, 8)"), "gave .2, 1, 8, 8.* any number"),
        (GOOD.replace("return self.conv(x)", "x += 1; return self.conv(x)"), "changes x in place"),
    ],
)
def test_mistakes_in_the_file_are_told_in_one_line(network, source, what):
    path, build, _ = network(source)
    with pytest.raises(InputError, match=what) as caught:
        load(path, build)
    assert "\n" not in str(caught.value)


def test_weights_that_want_code_are_refused_before_any_file_is_run(network, tmp_path):
    path, build, _ = network("raise AssertionError('was run')")

    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"w": Evil()}, path)
    with pytest.raises(InputError, match="running code") as caught:
        load(path, build)
    assert "was run" not in str(caught.value)


def test_whole_numbers_are_no_weights(network):
    path, build, weights = network()
    torch.save({key: value.long() for key, value in weights.items()}, path)
    with pytest.raises(InputError, match=r"not of floating point in 3 weights \(\S+ is int64, ") as caught:
        load(path, build)
    assert "\n" not in str(caught.value)
    counting = GOOD.replace("self.conv =", "self.register_buffer('n', torch.tensor(3)); self.conv =")
    path, build, weights = network(counting)
    torch.save(weights | {"n": torch.tensor(4)}, path)
    assert load(path, build).unet.net.n == 4  # an integer where one is expected


def test_missing_flags_are_named(network):
    path, build, _ = network()
    with pytest.raises(InputError, match="--shape C,H,W"):
        load(path, build, shape=None)


@pytest.mark.parametrize(
    ("decorated", "returned", "what"),
    [
        ("@torch.no_grad()", "self.conv(x)", "does not depend on the parameters"),
        ("@torch.inference_mode()", "self.conv(x)", "does not depend on the parameters"),
        ("", "self.conv(x).detach()", "does not depend on the parameters"),
        ("", "self.conv(x).exp_().sigmoid().add_(1)", "gradient raised"),
    ],
)
def test_a_network_without_gradients_draws_but_is_no_teacher(network, tmp_path, capsys, decorated, returned, what):
    source = GOOD.replace("    def forward", f"    {decorated}\n    def forward")
    source = source.replace("self.conv(x) * self.scale(t.reshape(-1, 1)).reshape(-1, 1, 1, 1)", returned)
    path, build, _ = network(source)
    teacher = [str(path), "--network", build, "--shape", "1,8,8", "--schedule", "linear"]
    assert (
        main(["sample", *teacher, "--solver", "ddim", "--nfe", "2", "-n", "1", "--out", str(tmp_path / "a.npy")]) == 0
    )
    capsys.readouterr()
    assert main(["distill", "--score-net", *teacher, "--nfe", "2", "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: --network my_net.py:build: ")
    assert what in told
    assert not (tmp_path / "run").exists()


def test_a_network_may_write_into_its_times(network):
    plain = load(*network()[:2])
    x, t = torch.randn(3, *SHAPE), torch.tensor([0, 5, 998])
    path, build, _ = network(GOOD.replace("return self.conv", "t += 1; return self.conv"))
    writing = load(path, build)
    torch.testing.assert_close(writing.eps(x, t), plain.eps(x, t + 1))
    torch.testing.assert_close(writing.eps(x, 5), plain.eps(x, 6))
    assert t.tolist() == [0, 5, 998]


def test_from_distillation_to_images(network, tmp_path, monkeypatch, capsys):
    path, build, _ = network()
    monkeypatch.chdir(tmp_path)
    teacher = ["--network", build, "--shape", "1,8,8", "--schedule", "linear"]
    small = [
        "--nfe",
        "2",
        "--steps",
        "2",
        "--batch",
        "4",
        "--rollout",
        "2",
        "--critic-steps",
        "1",
        "--preview-every",
        "1",
    ]
    assert main(["distill", "--score-net", str(path), *teacher, *small, "--out", "run"]) == 0
    out, err = capsys.readouterr()
    assert out.endswith("run\n")
    assert out.count("building") == 1  # the fixture's: what a user's file prints is no result
    assert err.count("building") == 2
    assert main(["sample", "run", "-n", "3", "--out", "a.npy"]) == 2
    assert "--network" in capsys.readouterr().err
    assert main(["sample", "run", "--network", build, "-n", "3", "--out", "a.npy"]) == 0
    assert np.load("a.npy").shape == (3, 8, 8, 1)
    capsys.readouterr()
    assert main(["inspect", "run/nfe2", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["network"] == "my_net.py:build"  # without its folder
    assert facts["parameters"] == 1000 + 10
    assert main(["sample", str(path), *teacher, "--solver", "ddim", "--nfe", "3", "-n", "2", "--out", "b.npy"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 1000 + 10
    resumed = ["distill", "--score-net", str(path), *teacher, *small, "--out", "run", "--resume"]
    assert main(resumed) == 0


def test_what_a_network_prints_is_never_a_result(network, tmp_path, monkeypatch, capfdbinary):
    path, build, _ = network(GOOD.replace("return self.conv", "print('called'); return self.conv"))
    monkeypatch.chdir(tmp_path)
    teacher = [str(path), "--network", build, "--shape", "1,8,8", "--schedule", "linear"]
    small = ["--nfe", "2", "--steps", "1", "--batch", "4", "--critic-steps", "1", "--json"]
    drawn = ["sample", *teacher, "--solver", "ddim", "--nfe", "2", "-n", "3"]
    np.save("reference.npy", np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), dtype=np.uint8))

    def stdout_of(*arguments):
        capfdbinary.readouterr()
        assert main(list(arguments)) == 0
        out, err = capfdbinary.readouterr()
        assert b"called" in err
        return out

    assert np.load(io.BytesIO(stdout_of(*drawn, "--out", "-"))).shape == (3, 8, 8, 1)
    assert json.loads(stdout_of(*drawn, "--out", "a.npy", "--json"))["out"] == "a.npy"
    assert json.loads(stdout_of("distill", "--score-net", *teacher, *small, "--dry-run"))["dry_run"]
    assert json.loads(stdout_of("distill", "--score-net", *teacher, *small, "--out", "run"))["run"] == "run"
    from_run = [*small, "--init-from", "run/nfe2", "--out", "again"]
    assert json.loads(stdout_of("distill", "--score-net", *teacher, *from_run))["run"] == "again"
    for file in ("a.safetensors", "a.pt"):
        assert json.loads(stdout_of("export", "run", "--network", build, "--out", file, "--json"))["out"] == file
    judged = ["--reference", "reference.npy", "--solver", "ddim", "--nfe", "2", "-n", "20", "--features", "digits"]
    assert json.loads(stdout_of("evaluate", *teacher, *judged, "--json"))


@pytest.mark.filterwarnings("default")
def test_a_file_that_has_changed_since_is_told_in_one_line(network, tmp_path, monkeypatch, capsys):
    path, build, _ = network()
    monkeypatch.chdir(tmp_path)
    teacher = [str(path), "--network", build, "--shape", "1,8,8", "--schedule", "linear"]
    small = ["--nfe", "2", "--steps", "1", "--batch", "4", "--critic-steps", "1", "--out", "run"]
    assert main(["distill", "--score-net", *teacher, *small]) == 0
    network(GOOD + "# changed\n")
    for command in (["sample", "run", "-n", "1", "--out", "a.npy"], ["export", "run", "--out", "a.safetensors"]):
        capsys.readouterr()
        assert main([*command, "--network", build]) == 0
        err = capsys.readouterr().err
        said = [line for line in err.splitlines() if "changed" in line]
        assert said == [
            f"warning: --network {build}: the file has changed since this network was saved with it: its images may be "
            "others"
        ]
        assert "UserWarning" not in err


def test_the_hash_is_that_of_the_content_wherever_the_file_lies(network, tmp_path):
    path, build, _ = network()
    (tmp_path / "elsewhere").mkdir()
    other = tmp_path / "elsewhere" / "my_net.py"
    other.write_text((tmp_path / "my_net.py").read_text())
    assert load(path, f"{other}:build").sha256 == load(path, build).sha256


def test_a_name_without_a_file_is_told_what_to_give(network):
    path, _, _ = network()
    with pytest.raises(InputError, match=r"FILE\.py:FUNCTION"):
        load(path, "my_net")
