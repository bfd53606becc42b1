"""The names that `import mlflow_dr` gives, and the example in its docstring."""

import re
import textwrap
from collections.abc import Callable
from pathlib import Path

import mlflow_dr
from mlflow_dr.encoder.model import Encoder
from mlflow_dr.encoder.saving import save_encoder

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_every_public_name_is_there() -> None:
    for name in mlflow_dr.__all__:
        assert callable(getattr(mlflow_dr, name)), name


def test_the_example_runs(make_tiny: Callable[..., Encoder], tmp_path: Path) -> None:
    save_encoder(tmp_path / "my-encoder", make_tiny(pooling="mean", normalize=True))
    example = re.search(r"\n\n(    import mlflow_dr\n.*)", mlflow_dr.__doc__ or "", re.DOTALL)
    assert example is not None
    code = textwrap.dedent(example[1]).replace("my-encoder", str(tmp_path / "my-encoder"))
    *statements, value = code.replace("irds:vaswani", str(EXAMPLES / "sea")).strip().splitlines()
    names: dict[str, object] = {}
    exec("\n".join(statements), names)
    assert 0 <= eval(value, names) <= 1
