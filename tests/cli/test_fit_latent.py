"""`hsivi fit-posterior --model latent` and `hsivi sample` of such fits, as their users type them."""

import json
import os
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from hsivi_cli.cli.app import main
from hsivi_cli.methods.latent_registry import METHODS
from hsivi_cli.methods.latent_store import open_latent

FEW = ("--model", "latent", "--steps", "5", "--threads", "1")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(50, 1))
    frame = pd.DataFrame(z + 0.3 * rng.normal(size=(50, 4)), columns=list("abcd"))
    frame["people"] = np.where(z[:, 0] > 0, "east", "west")
    frame["age"] = rng.integers(20, 60, 50)
    frame["flat"] = 1.0
    path = tmp_path_factory.mktemp("data") / "rows.csv"
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def fit(table, tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "FIT"
    assert run(table, *FEW, "--method", "vae", "--color-by", "age", "--save", path) == 0
    return path


def run(*argv):
    return main(["fit-posterior", *map(str, argv)])


def sample(*argv):
    return main(["sample", *map(str, argv), "--threads", "1"])


def fails(capsys, says, code):
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert says in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_map_of_rows_with_everything(table, tmp_path, capsys):
    out, plot = tmp_path / "latents.csv", tmp_path / "map.png"
    code = run(table, *FEW, "--color-by", "people", "--labels", "age", "--method", "gpvae", "--out", out, "-n", 2,
               "--plot", plot)  # fmt: skip
    text, err = capsys.readouterr()
    assert code in (0, 3)
    assert "IWAE-64" in text
    assert "20-NN" in text
    assert "5 of 50 rows are held out by seed 0" in err
    assert "constant and left out: flat" in err
    frame = pd.read_csv(out)
    assert list(frame.columns) == [
        "row", "people", "age", "z1", "z2", "z1.sd", "z2.sd", "uncertainty",
        "z1.draw1", "z2.draw1", "z1.draw2", "z2.draw2",
    ]  # fmt: skip
    source = pd.read_csv(table)
    assert list(frame["people"]) == list(source["people"])
    assert list(frame["row"]) == list(range(1, 51))
    with Image.open(plot) as picture:
        assert min(picture.size) > 300


def test_one_table_compares_methods_on_one_split(table, capsys):
    code = run(table, *FEW, "--method", "vae", "--compare", "vae,pca,aae", "--color-by", "people", "--json")
    found = json.loads(capsys.readouterr().out)
    assert code in (0, 3)
    assert [report["method"] for report in found["compared"]] == ["vae", "pca", "aae"]
    assert found["method"] == "vae"
    vae, pca, aae = found["compared"]
    assert {report["rows"] for report in found["compared"]} == {5}
    assert pca["elbo"] == pytest.approx(pca["iwae"], abs=1e-9)
    assert vae["elbo"] < vae["iwae"]
    assert aae["iwae"] is None
    assert vae["scores"]["amortisation gap"] > 0
    assert vae["scores"]["approximation gap"] > -0.01


def test_chosen_columns_make_a_map_of_clusters_in_groups(table, tmp_path, capsys):
    plot, out = tmp_path / "map.png", tmp_path / "z.csv"
    code = run(table, *FEW, "--columns", "a,b,c", "--noise", "shared", "--clusters", 3, "--color-by", "age",
               "--group-by", "people", "--compare", "ddvi,vae,pca", "--plot", plot, "--out", out)  # fmt: skip
    err = capsys.readouterr().err
    assert code in (0, 3)
    assert "rows of 3 numbers" in err
    assert plot.stat().st_size > 1000
    assert {"d", "flat", "people", "cluster"} < set(pd.read_csv(out).columns)
    code = run(table, *FEW, "--clusters", 3, "--color-by", "people", "--compare", "ddvi,pca", "--json")
    ours, pca = json.loads(capsys.readouterr().out)["compared"]
    assert list(ours["clusters"]) == ["prior", "k-means", "mixture"]
    assert list(pca["clusters"]) == ["k-means", "mixture"]
    assert set(pca["clusters"]["mixture"]) == {"purity", "completeness", "nmi"}


def test_settings_reach_the_method_they_name_and_differences_are_of_the_same_rows(table, tmp_path, capsys):
    kept = tmp_path / "G"
    sets = ("--set", "kappa=0.5", "--set", "vae-decay.weight_decay=2", "--set", "sa-vae.svi_steps=1")
    peers = "gpvae-fg,vae-decay,sa-vae,aae"
    code = run(table, *FEW, "--method", "gpvae", "--compare", peers, *sets, "--save", kept, "--json")
    found, err = capsys.readouterr()
    assert code in (0, 3)
    assert "(vae-decay.weight_decay=2)" in err
    assert open_latent(kept).posterior.state.config.kappa == 0.5
    gpvae, both, decay, svi, aae = json.loads(found)["compared"]
    assert gpvae["less"] is None
    assert aae["less"] is None
    for other in (both, decay, svi):
        assert other["less"]["method"] == "gpvae"
        assert other["less"]["iwae"] == pytest.approx(other["iwae"] - gpvae["iwae"], abs=1e-9)
        assert other["less"]["elbo"] == pytest.approx(other["elbo"] - gpvae["elbo"], abs=1e-9)
        assert 0 < other["less"]["iwae_se"] < other["iwae_se"]
    assert run(table, *FEW, "--method", "vae", "--compare", "iwae") in (0, 3)
    assert "less vae's" in capsys.readouterr().out


def test_numbers_are_binarised_alike_in_the_fit_and_for_new_rows(table, tmp_path, capsys):
    fails(capsys, "--binarise 0.5 makes it so", run(table, *FEW, "--method", "vae", "--family", "bernoulli"))
    kept, argv = tmp_path / "B", (table, *FEW, "--method", "vae", "--binarise", "0.2", "--save", tmp_path / "B")
    assert run(*argv) in (0, 3)
    assert open_latent(kept).model.likelihood.name == "bernoulli"
    frame = pd.read_csv(table)
    frame[list("abcd")] = (frame[list("abcd")] > 0.2).astype(float)
    frame.to_csv(tmp_path / "ones.csv", index=False)
    capsys.readouterr()
    found = []
    for source in (table, tmp_path / "ones.csv"):
        assert sample(kept, "--observe", source, "--json") == 0
        found.append(json.loads(capsys.readouterr().out)["mean"])
    assert found[0] == found[1]
    fails(capsys, "--resume: binarise was 0.2, now 0.3", run(*argv[:-3], "0.3", "--save", kept, "--resume"))


def test_new_rows_get_the_latents_that_the_fit_gave_them(table, fit, tmp_path, capsys):
    again = tmp_path / "again.csv"
    assert sample(fit, "--observe", table, "--out", again) == 0
    assert sample(fit, "--observe", table) == 0
    assert "latents of 50 rows" in capsys.readouterr().out
    frame = pd.read_csv(again)
    assert len(frame) == 50
    assert np.isfinite(frame[["z1", "z2", "z1.sd", "z2.sd"]]).all(axis=None)
    shifted = pd.read_csv(table)
    shifted.loc[3, "a"] = 1e4
    shifted[["d", "c", "b", "a"]].to_csv(tmp_path / "far.csv", index=False)
    assert sample(fit, "--observe", tmp_path / "far.csv", "--json") == 0
    out, err = capsys.readouterr()
    assert "1 of 50 rows have a number far beyond" in err
    assert 'the first: row 4, "a" is 10000' in err
    # the columns were found by name, in another order
    np.testing.assert_allclose(np.array(json.loads(out)["mean"])[:3], frame[["z1", "z2"]].to_numpy()[:3], atol=0.6)


def test_fantasies_are_rows_or_pictures(fit, tmp_path, capsys):
    assert sample(fit, "-n", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "z1,z2,a,b,c,d"
    assert len(lines) == 4
    fails(capsys, "rows of numbers", sample(fit, "--out", tmp_path / "x.png"))
    kept = tmp_path / "D"
    assert run("digits", *FEW, "--method", "vae", "--save", kept) in (0, 3)
    grid = tmp_path / "grid.png"
    assert sample(kept, "-n", 9, "--out", grid) == 0
    with Image.open(grid) as picture:
        assert min(picture.size) >= 400
    assert main(["inspect", str(kept), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["kind"] == "posterior fit"
    assert facts["report"]["latent"] == 2


def test_missing_values_are_fitted_around(tmp_path, capsys):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(40, 3))
    values[rng.random(values.shape) < 0.2] = np.nan
    pd.DataFrame(values, columns=list("abc")).to_csv(tmp_path / "gaps.csv", index=False)
    for method in ("ddvi", "vae", "aae", "pca"):
        assert run(tmp_path / "gaps.csv", *FEW, "--method", method, "--json") in (0, 3)
        out, err = capsys.readouterr()
        assert "values are missing" in err
        assert method == "aae" or np.isfinite(json.loads(out)["iwae"])


def test_a_stream_of_latents_is_nothing_but_csv(table, capsys):
    assert run(table, *FEW, "--method", "pca", "--out", "-") in (0, 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("row,people,z1,z2")
    assert len(lines) == 51


def test_a_saved_run_is_not_overwritten_and_must_be_the_same(table, fit, capsys):
    fails(capsys, "add --resume", run(table, *FEW, "--method", "vae", "--save", fit))
    fails(
        capsys,
        "--resume: seed was 0, now 1",
        run(table, *FEW, "--method", "vae", "--color-by", "age", "--save", fit, "--resume", "--seed", 1),
    )


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--latent", "9"), "--latent 9 is more than the 5 columns"),
        (("--labels", "nope"), "nope"),
        (("--color-by", "nope"), "nope"),
        (("--compare", "vae,tsne"), "--compare tsne"),
        (("--method", "smc"), "--method 'smc' is unknown"),
        (("--prior", "a=normal(0,1)"), "--model latent has one prior"),
        (("--prior", "pinwheel", "--clusters", "3"), "exclude each other"),
        (("--prior", "pinwheel", "--latent", "1"), "two dimensions"),
        (("--formula", "a ~ b"), "--formula does nothing with --model latent"),
        (("--paper", "--method", "vae"), "--paper does nothing for --method vae"),
        (("--family", "bernoulli"), "0 and 1"),
        (("--out", "x.nc"), "latents are a table"),
        (("--out", "-", "--json"), "both want stdout"),
        (("--resume",), "--resume needs the --save"),
        (("--hold-out", "1"), "--hold-out 1"),
        (("--labels", "people", "--prior", "normal"), "--labels needs a prior"),
        (("--columns", "a,people"), 'column "people", row 1'),
        (("--columns", "a,e"), 'no column "e"'),
        (("--columns", "a..c"), "a range is written as PC1..PC10"),
        (("--columns", "a,age", "--color-by", "age"), "never data"),
        (("--noise", "none"), "--noise none"),
        (("--group-by", "nope"), "nope"),
        (("--clusters", "51"), "--clusters 51 is more than the 50 rows"),
        (("--labels", "a"), "names rows and groups none"),
        (("--labels", "flat"), "one class only"),
        (("--binarise", "0.5", "--family", "gaussian"), "leave --family gaussian out"),
        (("--binarise", "99"), "none of the 6 columns"),
        (("--method", "gpvae", "--set", "tau=1"), 'gpvae has no "tau": it has schedule'),
        (("--method", "gpvae", "--set", "tau_mean=0"), "tau is 0"),
        (("--method", "gpvae", "--set", "vae.dropout=0.1"), "vae is not trained here"),
        (("--method", "vae", "--set", "clip=0"), "clip is 0"),
        (("--method", "vae", "--set", "weight_decay=-1"), "weight_decay is -1"),
        (("--method", "vae", "--set", "svi_test_steps=-1"), "svi_test_steps must be 0 or more"),
    ],
)
def test_what_means_nothing_is_refused_in_one_line(table, argv, says, capsys):
    fails(capsys, says, run(table, *FEW, *argv))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "one row only"),
        ("a,b\n1,2\n1,2\n", "none of the 2 columns"),
        ("a,b\nx,y\nu,v\n", "no column of numbers"),
        ("a,b\n1,2\n2,oops\n3,4\n", "not a number"),
        ("a,b\n1,inf\n2,3\n", "infinite"),
        ("a,a\n1,2\n2,3\n", 'more than one column named "a"'),
        ("a,b\n1,CT\n2,CC\n3,CTA\n4,TT\n", 'column "b", row 3 is "CTA", not a pair of letters'),
        ("a,b\n1,CT\n2,CC\n3,GG\n4,TT\n", 'bad.csv: column "b" has 3 alleles'),
    ],
)
def test_rows_that_are_none_are_refused_in_one_line(tmp_path, text, says, capsys):
    (tmp_path / "bad.csv").write_text(text)
    fails(capsys, says, run(tmp_path / "bad.csv", *FEW))


def test_a_file_that_is_no_parquet_and_a_vcf_cut_short_are_named(tmp_path, capsys):
    (tmp_path / "no.parquet").write_text("hello")
    fails(capsys, "no parquet file", run(tmp_path / "no.parquet", *FEW))
    pytest.importorskip("cyvcf2")
    head = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tp1\tp2\n"
    (tmp_path / "cut.vcf").write_text(
        head + "1\t1\ta\tC\tT\t.\tPASS\t.\tGT\t0/0\t0/1\n1\t2\tb\tC\tT\t.\tPASS\t.\tGT\t0/0\n"
    )
    fails(capsys, "damaged or no VCF after 1 variants", run(tmp_path / "cut.vcf", *FEW))


def test_text_that_is_not_fitted_is_told(table, capsys):
    assert run(table, *FEW, "--method", "pca") in (0, 3)
    assert "1 column is text, not fitted but written beside the latents: people" in capsys.readouterr().err


def test_latents_that_say_nothing_of_rows_held_out_are_told(tmp_path, capsys):
    noise = pd.DataFrame(np.random.default_rng(3).normal(size=(200, 6)), columns=list("abcdef"))
    noise.to_csv(tmp_path / "noise.csv", index=False)
    for method in ("vae", "pca"):
        assert run(tmp_path / "noise.csv", *FEW[:2], "--steps", "150", "--threads", "1", "--method", method) in (0, 3)
        out = capsys.readouterr().out
        assert "tell nothing of these rows" in out or "collapsed" in out
        assert not out.splitlines()[-1].startswith("trust")


def test_a_row_without_a_number_is_fitted_around_by_all(tmp_path, capsys):
    frame = pd.DataFrame(np.random.default_rng(2).normal(size=(30, 3)), columns=list("abc"))
    frame.iloc[4] = np.nan
    frame.to_csv(tmp_path / "hole.csv", index=False)
    for method in ("pca", "iaf"):
        assert run(tmp_path / "hole.csv", *FEW, "--method", method) in (0, 3)
        assert "1 of 30 rows have no value at all" in capsys.readouterr().err


def test_new_rows_with_gaps_are_told_of_a_fit_that_has_seen_none(table, fit, tmp_path, capsys):
    frame = pd.read_csv(table)[list("abcd")]
    frame.loc[2, "a"], frame.loc[5] = np.nan, np.nan
    frame.to_csv(tmp_path / "gaps.csv", index=False)
    assert sample(fit, "--observe", tmp_path / "gaps.csv", "--json") == 0
    out, err = capsys.readouterr()
    assert "2 of 50 rows lack numbers, and the fit has seen none that do" in err
    assert "1 of 50 rows have no number at all" in err
    assert np.isfinite(json.loads(out)["mean"]).all()


@pytest.mark.parametrize("name", ["fit.safetensors", "report.json"])
def test_a_fit_cut_short_says_what_to_do(fit, table, name, tmp_path, capsys):
    broken = tmp_path / "FIT"
    shutil.copytree(fit, broken)
    (broken / name).write_bytes((fit / name).read_bytes()[:200])
    fails(capsys, "--resume writes it anew", sample(broken, "--observe", table))
    assert run(table, *FEW, "--method", "vae", "--color-by", "age", "--save", broken, "--resume") in (0, 3)
    assert sample(broken, "--observe", table) == 0


def test_a_run_goes_on_with_its_own_rows_only(table, fit, tmp_path, capsys):
    pd.read_csv(table).iloc[:40].to_csv(tmp_path / "fewer.csv", index=False)
    argv = (*FEW, "--method", "vae", "--color-by", "age", "--save", fit, "--resume")
    fails(capsys, "the data are not those that", run(tmp_path / "fewer.csv", *argv))


@pytest.mark.parametrize(("method", "compare"), [("ddvi", ()), ("vae", ("--compare", "vae,iaf"))])
def test_an_interrupted_run_resumes_bit_for_bit(table, tmp_path, method, compare, capsys, monkeypatch):
    """Ctrl-C in the third step of the last method."""
    argv = (table, *FEW, "--method", method, *compare, "-n", "1")
    assert run(*argv, "--save", tmp_path / "W", "--out", tmp_path / "w.csv") in (0, 3)
    last = METHODS[compare[-1].split(",")[-1] if compare else method].module
    step, calls = last.step, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(last, "step", interrupted)
    capsys.readouterr()
    assert run(*argv, "--save", tmp_path / "S", "--out", tmp_path / "s.csv") == 130
    assert "interrupted at step 3; checkpoint written, go on with --resume" in capsys.readouterr().err
    assert not (tmp_path / "s.csv").exists()
    assert run(*argv, "--save", tmp_path / "S", "--out", tmp_path / "s.csv", "--resume") in (0, 3)
    assert len(calls) == 5
    assert (tmp_path / "s.csv").read_bytes() == (tmp_path / "w.csv").read_bytes()


def test_ctrl_c_outside_the_training_is_told_too(table, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("hsivi_cli.methods.latent_fit.read_latent", interrupted)
    assert run(table, *FEW) == 130
    assert "interrupted" in capsys.readouterr().err.splitlines()[-1]


def test_genotypes_are_0_1_or_2(tmp_path, capsys):
    (tmp_path / "geno.csv").write_text("s1,s2\n0,1\n2,1\n1,0\n3,2\n")
    fails(capsys, 'column "s1", row 4 is 3', run(tmp_path / "geno.csv", *FEW, "--family", "binomial"))


def test_options_of_latents_need_the_word(table, tmp_path, capsys, monkeypatch):
    for argv in (("--latent", "2"), ("--labels", "people"), ("--hold-out", "0.2"), ("--compare", "vae"),
                 ("--binarise", "0.5"), ("--set", "kappa=1")):  # fmt: skip
        fails(capsys, f"{argv[0]} goes with --model latent", run(table, *argv))
    fails(capsys, "add --model latent", run(table, "--method", "ddvi"))
    monkeypatch.chdir(tmp_path)
    fails(capsys, "does not exist", run(table, "--model", "./latent"))
    fails(capsys, "unfinished", _unfinished(tmp_path))


def _unfinished(tmp_path):
    (tmp_path / "U").mkdir()
    (tmp_path / "U" / "config.json").write_text('{"kind": "posterior", "latent_model": true}')
    return sample(tmp_path / "U")
