"""Latent-variable fits below the command line: the split, the guesses, what the verdict says, and what is kept."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from hsivi_cli.engine import loop
from hsivi_cli.errors import InputError
from hsivi_cli.io.latent_draws import LatentDraws
from hsivi_cli.io.rows import Rows
from hsivi_cli.methods import latent_fit, latent_report
from hsivi_cli.methods.latent_fit import Latents, in_order, latent_frame, latents_of, of_method, prepare, train
from hsivi_cli.methods.latent_registry import (
    METHODS,
    NAMES,
    PAPER,
    LatentOptions,
    check_latent,
    config_from_json,
    config_to_json,
    guess_family,
    method_config,
    model_config,
)
from hsivi_cli.methods.latent_report import report_on_fit
from hsivi_cli.methods.latent_store import open_latent, read_new_rows, save_latent
from hsivi_cli.methods.latent_training import gaussian_log_prob
from hsivi_cli.targets.latent import LatentModel
from hsivi_cli.targets.latent_priors import Narrowing, make_prior
from hsivi_cli.targets.likelihoods import Likelihood


def make_rows(count=60, columns=4, kind="numbers", seed=0, labelled=True):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(count, 1))
    values = (z + 0.3 * rng.normal(size=(count, columns))).astype(np.float32)
    other = pd.DataFrame({"side": np.where(z[:, 0] > 0, "right", "left")}) if labelled else None
    return Rows(values, tuple(f"c{j}" for j in range(columns)), other, kind=kind, source="toy.csv")


def quiet(record):
    pass


def fit(name, rows, directory, **options):
    fields = {"method": name, "steps": 3, "latent": 2} | options
    settings = LatentOptions(**fields)
    prepared = prepare(rows, settings)
    return train(prepared, name, settings, directory, quiet, False), prepared


def test_the_split_moves_rows_and_loses_none():
    rows = make_rows(101)
    before = rows.values.copy()
    prepared = prepare(rows, LatentOptions(hold_out=0.2, seed=3, color_by="side"))
    assert prepared.train == 101 - 20
    np.testing.assert_array_equal(prepared.rows.values, before[prepared.order])
    assert sorted(prepared.order) == list(range(101))
    expected = (before.mean(1) > -np.inf) & (rows.other["side"] == "right").to_numpy()
    np.testing.assert_array_equal(prepared.colors.numpy() == 1, expected[prepared.order])
    other = prepare(make_rows(101), LatentOptions(hold_out=0.2, seed=4))
    assert set(other.order[81:]) != set(prepared.order[81:])
    again = prepare(make_rows(101), LatentOptions(hold_out=0.2, seed=3))
    np.testing.assert_array_equal(again.order, prepared.order)


def test_latents_come_back_in_the_order_of_the_source():
    prepared = prepare(make_rows(30), LatentOptions(hold_out=0.3))
    where = torch.from_numpy(prepared.order).double()[:, None]
    latents = in_order(Latents(where, where, where[None], where[:, 0].long(), where[:, 0]), prepared.order)
    line = torch.arange(30).double()
    for part in (latents.mean[:, 0], latents.sd[:, 0], latents.draws[0, :, 0], latents.cluster, latents.uncertainty):
        torch.testing.assert_close(part.double(), line)
    frame = latent_frame(latents, prepared.rows.other)
    assert list(frame.columns) == ["row", "side", "z1", "z1.sd", "cluster", "uncertainty", "z1.draw1"]


@pytest.mark.parametrize(
    ("values", "kind", "family"),
    [
        ([0, 1, 1], "numbers", "bernoulli"),
        ([0, np.nan, 2], "numbers", "binomial"),
        ([0, 1, 1], "genotypes", "binomial"),
        ([0, 0.5, 1], "images", "gaussian"),
        ([0, 1, 3], "numbers", "gaussian"),
        ([0, -1, 1], "numbers", "gaussian"),
    ],
)
def test_the_likelihood_is_guessed_from_the_numbers(values, kind, family):
    rows = Rows(np.array(values, np.float32)[:, None], ("a",), kind=kind, source="x")
    assert guess_family(rows)[0] == family


def test_thin_priors_are_approached_and_said_to_be():
    rows = make_rows()
    for prior, thin in (("normal", False), ("pinwheel", True), ("square", True)):
        options = LatentOptions(prior=prior, compare=("vae",))
        model, facts = model_config(options, rows, 0)
        assert any("thin" in fact for fact in facts) == thin
        ours = [method_config(name, options, model, False) for name in ("vae", "aae", "ddvi")]
        assert [config.lr for config in ours] == [3e-3 if thin else 1e-3, 1e-3, 3e-3]
        assert ours[2].gamma < 1


def test_labels_bring_a_cluster_each_unless_a_prior_is_chosen():
    rows = make_rows()
    assert model_config(LatentOptions(labels="side"), rows, 3)[0].clusters == 3
    assert model_config(LatentOptions(labels="side", prior="pinwheel"), rows, 3)[0].clusters == 0
    assert model_config(LatentOptions(labels="side", method="vae"), rows, 3)[0].clusters == 0


@pytest.mark.parametrize("name", [*NAMES, PAPER])
def test_every_method_trains_reports_and_opens_again_with_the_same_draws(name, tmp_path):
    torch.set_num_threads(1)
    trained, prepared = fit(name, make_rows(40), tmp_path)
    report = report_on_fit(trained, prepared, 8, 0)
    assert report.rows == 4
    assert report.held_out
    assert (report.iwae is None) == (name in ("aae", PAPER))
    if report.iwae is not None:
        assert report.elbo <= report.iwae + 1e-9
    assert (report.pseudo_elbo is not None) == (name == PAPER)
    save_latent(tmp_path, trained, prepared, report.to_json())
    opened = open_latent(tmp_path)
    assert opened.name == name
    x = prepared.test
    want = latents_of(trained.posterior, trained.model, x, 5, 2)
    got = latents_of(opened.posterior, opened.model, x, 5, 2)
    torch.testing.assert_close(got.draws, want.draws)
    torch.testing.assert_close(got.mean, want.mean)
    plain, weighed = (
        trained.posterior.draw(x, 1, torch.Generator().manual_seed(1), weigh=weigh) for weigh in (False, True)
    )
    assert plain.log_weight is None
    torch.testing.assert_close(plain.z, weighed.z)
    config = method_config(name, LatentOptions(method=name), prepared.model, True)
    assert config_from_json(name, config_to_json(config)) == config


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    torch.set_num_threads(1)
    whole, _ = fit("ddvi", make_rows(40), make(tmp_path / "a"), steps=6, labels="side")
    make(tmp_path / "b")
    settings = LatentOptions(steps=6, labels="side")
    prepared = prepare(make_rows(40), settings)

    module = METHODS["ddvi"].module
    config = method_config("ddvi", settings, prepared.model, False)
    task = latent_fit.LatentTask(
        prepared.values[: prepared.train],
        latent_fit.build_model(prepared.model, prepared.values[: prepared.train]),
        prepared.labels[: prepared.train],
    )
    state = module.init(task, config)
    hooks = loop.Hooks(quiet, batch=latent_fit._batches(task.rows, task.labels))
    loop.run_loop(module, state, loop.LoopConfig(4, 0), tmp_path / "b", hooks)
    resumed = train(prepared, "ddvi", settings, tmp_path / "b", quiet, True)
    assert resumed.state.step == 6
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def make(path):
    path.mkdir()
    return path


class Known:
    """A posterior whose weights are known: x ~ N(z, 1), z ~ N(0, 1), q too narrow by `narrow`; units may not move."""

    def __init__(self, narrow=1.0, still=False, density=True):
        self.narrow, self.still, self.density = narrow, still, density

    def draw(self, x, k, generator, weigh=True):
        mean, sd = x[:, :1] / 2, math.sqrt(0.5) * self.narrow * torch.ones(len(x), 1)
        z = mean + sd * torch.randn(k, len(x), 1, generator=generator)
        log_q = torch.distributions.Normal(mean, sd).log_prob(z)[..., 0]
        normal = torch.distributions.Normal(0.0, 1.0)
        log_p = normal.log_prob(z)[..., 0] + torch.distributions.Normal(z[..., 0], 1.0).log_prob(x[:, 0])
        shown = torch.zeros_like(mean) if self.still else mean
        return LatentDraws(z, (log_p - log_q).double() if self.density else None, shown, sd)


def known_report(posterior, method="vae", iwae=32):
    from hsivi_cli.networks.decoders import MlpDecoder
    from hsivi_cli.targets.latent import LatentModel
    from hsivi_cli.targets.latent_priors import make_prior
    from hsivi_cli.targets.likelihoods import Likelihood

    x = 2**0.5 * torch.randn(300, 1, generator=torch.Generator().manual_seed(1))
    rows = Rows(x.numpy(), ("x",), source="toy")
    prepared = prepare(rows, LatentOptions(latent=1, method=method))
    model = LatentModel(make_prior("normal", 1), MlpDecoder(1, (), 1), Likelihood("gaussian"), torch.zeros(1))
    state = type("State", (), {"model": model, "step": 1})()
    return report_on_fit(latent_fit.Trained(method, state, posterior, 0.0), prepared, iwae, 0), prepared


def test_exact_weights_give_the_evidence_and_trust():
    report, prepared = known_report(Known())
    truth = torch.distributions.Normal(0.0, 2**0.5).log_prob(prepared.test).mean()
    assert report.iwae == pytest.approx(float(truth), abs=1e-5)
    assert report.elbo == pytest.approx(report.iwae, abs=1e-5)
    assert report.verdict.level == "trust"
    assert report.used == report.latent == 1
    assert report.to_json()["khat"]["share_above_0.7"] == 0


def test_a_posterior_far_too_narrow_is_found_out():
    report, _ = known_report(Known(narrow=0.25))
    assert report.verdict.level == "no"
    assert report.iwae > report.elbo
    assert "k-hat" in report.verdict.line


def test_collapse_is_reported_and_costs_trust():
    report, _ = known_report(Known(still=True))
    assert report.used == 0
    assert report.verdict.level == "care"
    assert "collapsed" in report.verdict.line


def test_draws_without_a_density_have_no_bound_and_no_trust():
    report, _ = known_report(Known(density=False), "aae")
    assert report.elbo is None
    assert report.iwae is None
    assert report.verdict.level == "care"
    paper, _ = known_report(Known(density=False), PAPER)
    assert "not a bound" in paper.verdict.line


def test_units_in_use_count_the_ones_that_move():
    assert latent_report._judge("vae", None, (), 2, 2).reasons[0].startswith("draws of vae")
    assert "1 of 2" in " ".join(latent_report._judge("vae", None, (), 1, 2).reasons)
    assert "collapsed" not in latent_report._judge("vae", None, (), 11, 20).line


def test_new_rows_must_have_the_columns_of_the_fit(tmp_path):
    torch.set_num_threads(1)
    trained, prepared = fit("vae", make_rows(40), tmp_path)
    save_latent(tmp_path, trained, prepared, {})
    opened = open_latent(tmp_path)
    frame = pd.DataFrame({"c3": [0.3], "extra": ["x"], "c0": [0.0], "c1": [0.1], "c2": [0.2]})
    frame.to_csv(tmp_path / "new.csv", index=False)
    rows, x = read_new_rows(opened, str(tmp_path / "new.csv"))
    torch.testing.assert_close(x, torch.tensor([[0.0, 0.1, 0.2, 0.3]]))
    assert list(rows.other.columns) == ["extra"]
    frame.drop(columns="c1").to_csv(tmp_path / "less.csv", index=False)
    with pytest.raises(InputError, match="c1"):
        read_new_rows(opened, str(tmp_path / "less.csv"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (LatentOptions(method="svi"), "--method svi"),
        (LatentOptions(compare=("vae", "umap")), "--compare umap"),
        (LatentOptions(prior="banana"), "--prior banana"),
        (LatentOptions(family="poisson"), "--family poisson"),
        (LatentOptions(prior="normal", clusters=3), "exclude"),
        (LatentOptions(clusters=1), "--clusters 1"),
        (LatentOptions(hold_out=1.5), "--hold-out 1.5"),
        (LatentOptions(method=PAPER, clusters=3), "--paper"),
        (LatentOptions(method="pca", prior="square"), "pca"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, says):
    with pytest.raises(InputError, match=says.replace("-", "[-]")):
        check_latent(options)


def test_images_may_have_convolutions_and_a_decoder_of_other_layers():
    rows = replace(make_rows(), shape=(2, make_rows().values.shape[1] // 2, 1), kind="images")
    options = LatentOptions(method="vae", embedding="image", compare=("ddvi",))
    model, _ = model_config(options, rows, 0)
    assert model.shape == rows.shape
    assert all(method_config(name, options, model, False).shape == rows.shape for name in options.methods)
    model, _ = model_config(LatentOptions(method="vae", settings=("model.hidden=7,5",)), rows, 0)
    assert (model.hidden, model.shape) == ((7, 5), None)
    with pytest.raises(InputError, match="no images"):
        model_config(options, make_rows(), 0)
    for wrong, words in (
        ({"embedding": "set"}, "knows mlp and image"),
        ({"settings": ("model.hidden=0",)}, "one unit or more"),
        ({"settings": ("model.latent=3",)}, "it has hidden"),
        ({"embedding": "image", "method": "ddvi-paper"}, "no convolutions"),
        ({"embedding": "image", "method": "vae", "settings": ("model.hidden=5",)}, "leave one of the two out"),
    ):
        with pytest.raises(InputError, match=words):
            check_latent(LatentOptions(**wrong))


@pytest.mark.parametrize("method", ["vae", "ddvi", "iaf"])
def test_a_thin_prior_is_itself_at_the_end_and_when_opened_again(method, tmp_path):
    options = LatentOptions(method, prior="square", steps=6, compare=())
    prepared = prepare(make_rows(), options)
    trained = train(prepared, method, options, tmp_path, lambda record: None, False)
    prior = trained.model.prior
    assert isinstance(prior, Narrowing)
    assert prior._now is prior.exact
    report = report_on_fit(trained, prepared, 4, 0)
    save_latent(tmp_path, trained, prepared, report.to_json())
    opened, x = open_latent(tmp_path), prepared.test
    draws = [
        one.draw(x, 3, torch.Generator().manual_seed(0)).log_weight for one in (trained.posterior, opened.posterior)
    ]
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    ("method", "setting"),
    [("vae", "narrow=2"), ("ddvi", "narrow=-1"), ("vae", "kl_warmup=-5"), ("ddvi", "clip=-1"), ("ddvi", "hidden=0"),
     ("ddvi", "spread=1")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(method, setting, tmp_path):
    options = LatentOptions(method, steps=2, settings=(setting,))
    with pytest.raises(InputError):
        train(prepare(make_rows(), options), method, options, tmp_path, lambda record: None, False)


def test_the_size_of_a_minibatch_is_the_methods_own(tmp_path):
    states = []
    for place, size in enumerate((4, 16)):
        options = LatentOptions("ddvi", steps=2, settings=(f"batch={size}",))
        (tmp_path / str(place)).mkdir()
        prepared = prepare(make_rows(), options)
        states.append(train(prepared, "ddvi", options, tmp_path / str(place), lambda record: None, False).state)
    assert not torch.equal(*(next(state.encoder.parameters()) for state in states))


def test_log_p_behind_the_approximation_gap_knows_modes_that_the_gaussian_does_not():
    """x = |z| + noise: the best Gaussian has one of two modes, and its gap is log 2."""

    class Folded(torch.nn.Module):
        def forward(self, z):
            return z.abs()

    sd = 0.2
    model = LatentModel(make_prior("normal", 1), Folded(), Likelihood("gaussian"), log_sd=torch.tensor([math.log(sd)]))
    x = torch.full((64, 1), 1.5)
    spread = 1 / math.sqrt(1 + 1 / sd**2)
    mean, scale = torch.full((64, 1), 1.5 * spread**2 / sd**2), torch.full((64, 1), spread)
    found = latent_report.defensive_log_p(model, x, mean, scale, torch.Generator().manual_seed(0))
    grid = torch.linspace(-6, 6, 100_001)[:, None, None]
    exact = float(model.log_joint(x[:1], grid).detach().double().logsumexp(0)) + math.log(12 / 100_000)
    assert abs(float(found.mean()) - exact) < 0.02
    z = mean + scale * torch.randn(20_000, 64, 1, generator=torch.Generator().manual_seed(1))
    elbo = (model.log_joint(x, z) - gaussian_log_prob(z, mean, scale)).detach().mean()
    assert abs(float(found.mean() - elbo) - math.log(2)) < 0.03


def test_typical_draws_stand_in_the_table_of_posteriors_with_modes_alone():
    z = torch.zeros(3, 2)
    latents = Latents(z, z, None, None, None, z + 1)
    assert list(latent_frame(of_method(latents, "vae"), None).columns) == ["row", "z1", "z2", "z1.sd", "z2.sd"]
    frame = latent_frame(of_method(latents, "ddvi"), None)
    assert frame["z2.typical"].tolist() == [1.0] * 3


def test_a_row_without_a_number_has_the_priors_latents(tmp_path):
    options = LatentOptions("vae", prior="square", steps=4)
    prepared = prepare(make_rows(), options)
    trained = train(prepared, "vae", options, tmp_path, lambda record: None, False)
    x = prepared.test[:3].clone()
    x[1] = math.nan
    found = latents_of(trained.posterior, trained.model, x, 0, 200)
    prior = trained.model.prior.sample(20_000, torch.Generator().manual_seed(5))
    assert torch.allclose(found.mean[1], prior.mean(0), atol=0.04)
    assert torch.allclose(found.sd[1], prior.std(0), atol=0.04)
    assert float((found.draws[:, 1].std(0) / prior.std(0) - 1).abs().max()) < 0.2
    x[1] = prepared.test[1]
    other = latents_of(trained.posterior, trained.model, x, 0, 200)
    assert torch.equal(found.mean[[0, 2]], other.mean[[0, 2]])
