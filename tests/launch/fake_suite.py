"""A package that stands for lmms-eval or lm-eval: ``python -m`` runs it, and it writes a recorded result file."""

import json
import sys
from pathlib import Path

RECORDED = Path(__file__).parent / "recorded"

MAIN = """
import json, sys
from pathlib import Path

words = sys.argv[1:]
given = dict(zip(words[::2], words[1::2]))
name = given["--tasks"]
print("FAKE SUITE", json.dumps(words))
if name == "fails":
    sys.exit(3)
if name != "silent":
    folder = Path(given["--output_path"]) / "model"
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.iterdir()))
    content = json.loads(Path({recorded!r}).read_text())
    content["results"] = {{name: value for value in content["results"].values()}}
    content["n-samples"] = {{name: value for value in content["n-samples"].values()}}
    (folder / f"{{number}}_results.json").write_text(json.dumps(content))
    (folder / f"{{number}}_samples_x.jsonl").write_text("")
"""


def install(folder: Path, module: str, recorded: str) -> None:
    """Write the package into a folder that will be on the path of Python."""
    package = folder / module
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(MAIN.format(recorded=str(RECORDED / recorded)))


def model_dir(folder: Path, model_type: str, **processor: int) -> Path:
    """Write the files by which an exported model is known; there are no weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def python() -> str:
    """Return the interpreter that runs the tests."""
    return sys.executable
