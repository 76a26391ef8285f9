"""Genotypes as counts 0, 1, 2 of one allele: from PLINK and VCF files through their own readers, and from letters.

The readers are optional: `pip install hsivi[genetics]` brings bed-reader and cyvcf2.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32

from hsivi_cli.errors import InputError

if TYPE_CHECKING:
    import pandas

PLINK_SUFFIXES = (".bed", ".bim", ".fam")
VCF_SUFFIXES = (".vcf", ".vcf.gz", ".vcf.bgz", ".bcf")
NO_CALL = ("", "--", "-", "00", "0", "NN", "N", "0/0/", "./.", "..", "??")
VARIANTS_AT_ONCE = 4096
_PAIR = re.compile(r"([ACGT])[/| ]?([ACGT])")

Genotypes = tuple[Float32[np.ndarray, "people variants"], list[str], list[str], list[str]]
"""Counts with NaN for no call, names of the people, names of the variants, and facts to tell the user."""


def is_genotype_file(path: Path) -> bool:
    """Whether the name is one of PLINK's three or of a VCF."""
    return path.name.lower().endswith((*PLINK_SUFFIXES, *VCF_SUFFIXES))


def read_genotypes(path: Path, every: int = 1) -> Genotypes:
    """Read PLINK `.bed/.bim/.fam` (any of the three names them all) or VCF; `every` keeps each so-manyth variant.

    PLINK counts allele 1 of the .bim file, VCF the alternative allele; variants of a VCF with several alternatives are
    passed over, which is told. Raises InputError in one line for files that are missing, damaged or without people.
    """
    if every < 1:
        raise InputError(f"every {every}th variant: the number must be 1 or more")
    plink = path.name.lower().endswith(PLINK_SUFFIXES)
    found = _read_plink(path, every) if plink else _read_vcf(path, every)
    if 0 in found[0].shape:
        raise InputError(f"{path} holds {found[0].shape[0]} people and {found[0].shape[1]} variants: both are needed")
    return found


def _read_plink(path: Path, every: int) -> Genotypes:
    try:
        from bed_reader import open_bed
    except ImportError as err:
        raise _extra(path, "bed-reader") from err
    bed = path.with_suffix(".bed")
    for part in (bed, path.with_suffix(".bim"), path.with_suffix(".fam")):
        if not part.is_file():
            raise InputError(f"{part} does not exist: PLINK data are three files, .bed, .bim and .fam, side by side")
    try:
        with open_bed(bed, num_threads=1) as file:
            chosen = np.arange(0, file.sid_count, every)
            values = np.empty((file.iid_count, len(chosen)), np.float32)
            for begin in range(0, len(chosen), VARIANTS_AT_ONCE):
                index = chosen[begin : begin + VARIANTS_AT_ONCE]
                values[:, begin : begin + len(index)] = file.read(index=np.s_[:, index], dtype="float32")
            people, names = [str(name) for name in file.iid], [str(name) for name in file.sid[chosen]]
    except (ValueError, OSError, RuntimeError, IndexError) as err:
        with bed.with_suffix(".bim").open(encoding="utf-8", errors="replace") as text:
            if "\t" not in text.readline():
                raise InputError(f"{text.name} is not separated by tabs: write it anew with plink --make-bed") from err
        raise InputError(f"{bed} is damaged or does not fit its .bim and .fam ({_first_line(err)})") from err
    return values, people, _distinct(names), []


def _read_vcf(path: Path, every: int) -> Genotypes:
    try:
        from cyvcf2 import VCF
    except ImportError as err:
        raise _extra(path, "cyvcf2") from err
    if not path.is_file():
        raise InputError(f"{path} does not exist: name a .vcf, .vcf.gz or .bcf file")
    calls, names, several = [], [], 0
    try:
        file = VCF(str(path), gts012=True)  # 0, 1, 2, and 3 for no call
        people = [str(name) for name in file.samples]
        if not people:
            raise InputError(f"{path} has no samples, only sites: name a VCF with genotypes")
        for number, variant in enumerate(file):
            if number % every:
                continue
            if len(variant.ALT) > 1:
                several += 1
                continue
            calls.append(variant.gt_types.astype(np.int8))
            names.append(variant.ID or f"{variant.CHROM}:{variant.POS}")
        file.close()
    except InputError:
        raise
    except Exception as err:  # cyvcf2 raises no narrower one
        raise InputError(
            f"{path} is damaged or no VCF after {len(calls) + several} variants ({_first_line(err)})"
        ) from err
    values = np.empty((len(people), len(calls)), np.float32)
    for column, call in enumerate(calls):
        values[:, column] = np.where(call == 3, np.nan, call)
    facts = [f"{several} variants with several alternative alleles are left out"] if several else []
    return values, people, _distinct(names), facts


def letters_of(column: "pandas.Series[Any]") -> set[str] | None:
    """The alleles in a column of pairs of letters such as "AG" or "A/G"; None where it is not such a column."""
    found: set[str] = set()
    for text in column.dropna().unique():
        if not isinstance(text, str):
            return None
        if text.strip() in NO_CALL:
            continue
        pair = _PAIR.fullmatch(text.strip())
        if pair is None:
            return None
        found.update(pair.groups())
    return found or None


def odd_letters(column: "pandas.Series[Any]") -> int | None:
    """The place, from 0, of the first value that is no pair of letters in a column that mostly holds such; or None."""
    there = column.dropna()
    pairs = there.map(lambda text: isinstance(text, str) and bool(_PAIR.fullmatch(text.strip())))
    if 2 * int(pairs.sum()) <= len(there):
        return None
    odd = there[~pairs & ~there.map(lambda text: isinstance(text, str) and text.strip() in NO_CALL)]
    return int(column.index.get_loc(odd.index[0])) if len(odd) else None


def count_letters(
    column: "pandas.Series[Any]", name: str, alleles: str | None = None
) -> tuple[Float32[np.ndarray, " n"], str]:
    """Counts of the alphabetically second allele, NaN for no call, and the alleles, as "AG".

    `alleles` are those of an earlier reading, so that new people are counted alike. Raises InputError where there are
    more than two, or others than those.
    """
    here = letters_of(column) or set()
    if alleles is None:
        if len(here) > 2:
            raise InputError(
                f'column "{name}" has {len(here)} alleles ({", ".join(sorted(here))}), and 0/1/2 can count one of two: '
                "take it out of the table"
            )
        alleles = "".join(sorted(here))
    elif here - set(alleles):
        raise InputError(
            f'column "{name}" holds allele {", ".join(sorted(here - set(alleles)))}, but the fit knows {alleles} only: '
            "check the strand"
        )
    second = alleles[1] if len(alleles) == 2 else None

    def count(text: object) -> float:
        pair = _PAIR.fullmatch(text.strip()) if isinstance(text, str) else None
        return float("nan") if pair is None else float(pair.groups().count(second or ""))

    codes: Mapping[object, float] = {text: count(text) for text in column.unique()}
    return np.array([codes.get(text, np.nan) for text in column], np.float32), alleles


def _distinct(names: Iterable[str]) -> list[str]:
    """Names made unique: "." or a repeated one gets its position."""
    seen: set[str] = set()
    found = []
    for position, name in enumerate(names, 1):
        unique = f"variant{position}" if name in ("", ".", "0") else name
        unique = f"{unique}#{position}" if unique in seen else unique
        seen.add(unique)
        found.append(unique)
    return found


def _extra(path: Path, package: str) -> InputError:
    return InputError(f"{path.name} is read through {package}, which is not here: pip install 'hsivi[genetics]'")


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0][:120]
