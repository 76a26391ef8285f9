"""Makes ancestry_map.png: `python ancestry_map.py PCs_1000G.csv eigenvalues_all_1000G.csv`.

The tables are those of github.com/machiela-lab/PCAmatchR (MIT): 20 principal components of 2,504 people of the 1000
Genomes project as eigenvectors of unit norm, and the eigenvalues. They are not shipped.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from hsivi_cli.cli.app import main

STEPS, COMPONENTS, COLOURS = 2000, 10, 256


def scaled_components(table: Path, eigenvalues: Path) -> pd.DataFrame:
    """The first ten components times the root of their eigenvalue, all divided by one number."""
    frame = pd.read_csv(table)
    names = [f"PC{j + 1}" for j in range(COMPONENTS)]
    values = frame[names].to_numpy() * np.sqrt(pd.read_csv(eigenvalues).to_numpy()[:COMPONENTS, 0])
    frame[names] = (values - values.mean(0)) / (values - values.mean(0)).std()
    return frame[["sample", *names]].assign(population=frame["pop"], superpopulation=frame["super_pop"])


if __name__ == "__main__":
    out = Path(__file__).with_name("ancestry_map.png")
    with tempfile.TemporaryDirectory() as folder:
        source, drawn = Path(folder) / "pcs.csv", Path(folder) / "map.png"
        scaled_components(Path(sys.argv[1]), Path(sys.argv[2])).to_csv(source, index=False)
        command = f"fit-posterior {source} --model latent --clusters 20 --color-by population --plot {drawn}"
        code = main([*command.split(), "--group-by", "superpopulation", "--steps", str(STEPS)])
        picture = Image.open(drawn).convert("RGB")
        picture.quantize(COLOURS, kmeans=4, dither=Image.Dither.NONE).save(out, optimize=True)
    sys.exit(code)
