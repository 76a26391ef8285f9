"""Genotypes from PLINK, VCF and letters: the right allele is counted, and what is missing stays missing."""

import builtins

import numpy as np
import pandas
import pytest

from hsivi_cli.errors import InputError
from hsivi_cli.io.genotypes import count_letters, letters_of
from hsivi_cli.io.rows import clean, read_rows

COUNTS = np.array([[0, 1, 2], [2, np.nan, 0], [1, 1, 0], [0, 0, np.nan]], np.float32)
VCF_TEXT = (
    "##fileformat=VCFv4.2\n##contig=<ID=1>\n##FORMAT=<ID=GT,Number=1,Type=String,Description=g>\n"
    "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tann\tbob\tcid\n"
    "1\t10\trs1\tA\tG\t.\t.\t.\tGT\t0/0\t0|1\t1/1\n"
    "1\t20\t.\tC\tT\t.\t.\t.\tGT\t./.\t1|0\t0/0\n"
    "1\t30\trs3\tC\tT,G\t.\t.\t.\tGT\t0/1\t1/2\t0/0\n"
    "1\t40\trs4\tG\tA\t.\t.\t.\tGT\t1/1\t0/0\t1/1\n"
)


def test_plink_files(tmp_path):
    bed_reader = pytest.importorskip("bed_reader", reason="the extra genetics is not installed")
    path = tmp_path / "people.bed"
    bed_reader.to_bed(path, COUNTS, properties={"iid": ["a", "b", "c", "d"], "sid": ["rs1", "rs2", "rs2"]})
    for name in ("people.bed", "people.bim", "people.fam"):
        rows = clean(read_rows(str(tmp_path / name)))
        assert np.array_equal(rows.values, COUNTS, equal_nan=True)
    assert rows.kind == "genotypes"
    assert rows.columns == ("rs1", "rs2", "rs2#3")
    assert rows.other["sample"].tolist() == ["a", "b", "c", "d"]
    thinned = read_rows(str(path), every=2)
    assert np.array_equal(thinned.values, COUNTS[:, ::2], equal_nan=True)
    assert read_rows(str(path), columns=["rs2"]).values.shape == (4, 1)
    with pytest.raises(InputError, match="1 or more"):
        read_rows(str(path), every=0)
    path.write_bytes(b"\x6c\x1b\x01")
    with pytest.raises(InputError, match="damaged"):
        read_rows(str(path))
    (tmp_path / "people.fam").unlink()
    with pytest.raises(InputError, match=r"people.fam does not exist"):
        read_rows(str(path))


def test_vcf_files(tmp_path):
    pytest.importorskip("cyvcf2", reason="the extra genetics is not installed")
    path = tmp_path / "people.vcf"
    path.write_text(VCF_TEXT, encoding="utf-8")
    rows = read_rows(str(path))
    assert np.array_equal(rows.values, np.array([[0, np.nan, 2], [1, 1, 0], [2, 0, 2]], np.float32), equal_nan=True)
    assert rows.columns == ("rs1", "1:20", "rs4") or rows.columns == ("rs1", "variant2", "rs4")
    assert rows.other["sample"].tolist() == ["ann", "bob", "cid"]
    assert any("1 variants with several" in fact for fact in rows.facts)
    path.write_text("nonsense\n", encoding="utf-8")
    with pytest.raises(InputError, match="no VCF"):
        read_rows(str(path))
    with pytest.raises(InputError, match="does not exist"):
        read_rows(str(tmp_path / "none.vcf.gz"))


@pytest.mark.parametrize(("name", "module"), [("a.bed", "bed_reader"), ("a.vcf", "cyvcf2")])
def test_the_extra_is_named_where_a_reader_is_missing(tmp_path, monkeypatch, name, module):
    plain = builtins.__import__

    def without(wanted, *rest, **options):
        if wanted == module:
            raise ImportError(wanted)
        return plain(wanted, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"hsivi\[genetics\]") as caught:
        read_rows(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_letters_are_counts_of_the_second_allele(tmp_path):
    path = tmp_path / "snps.csv"
    path.write_text("sample,rs1,rs2,rs3,sex\na,AG,C/T,GG,male\nb,GA,--,GG,female\nc,GG,TT,GG,male\nd,AA,,GG,male\n")
    rows = read_rows(str(path))
    wanted = [[1, 1, 0], [1, np.nan, 0], [2, 2, 0], [0, np.nan, 0]]
    assert np.array_equal(rows.values, np.array(wanted, np.float32), equal_nan=True)
    assert rows.kind == "genotypes"
    assert rows.alleles == {"rs1": "AG", "rs2": "CT", "rs3": "G"}
    assert list(rows.other.columns) == ["sample", "sex"]
    kept = clean(rows)
    assert kept.columns == ("rs1", "rs2")
    # new people are counted by the alleles of the fit, whatever they carry themselves
    path.write_text("sample,rs1,rs2\nx,GG,TT\ny,GG,CC\n")
    new = read_rows(str(path), columns=kept.columns, alleles=rows.alleles)
    assert new.values.tolist() == [[2, 2], [2, 0]]
    path.write_text("sample,rs1,rs2\nx,GT,TT\n")
    with pytest.raises(InputError, match='"rs1" holds allele T, but the fit knows AG'):
        read_rows(str(path), columns=kept.columns, alleles=rows.alleles)


def test_three_alleles_are_refused_and_words_are_no_genotypes():
    with pytest.raises(InputError, match="3 alleles"):
        count_letters(pandas.Series(["AG", "CC"]), "rs1")
    assert letters_of(pandas.Series(["AG", "male"])) is None
    assert letters_of(pandas.Series([1, 2])) is None
    assert letters_of(pandas.Series(["--", None])) is None


def test_counts_outside_0_1_2_are_refused(tmp_path):
    rows = read_rows(str(_letters(tmp_path)))
    rows.values[1, 0] = 3
    with pytest.raises(InputError, match=r'column "rs1", row 2 is 3, not 0, 1 or 2'):
        clean(rows)


def _letters(tmp_path):
    path = tmp_path / "two.csv"
    path.write_text("rs1,rs2\nAG,CC\nGG,CT\n")
    return path
