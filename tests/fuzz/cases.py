"""The kinds of cases: how a damaged file is written, and all the ways in which batude_fx reads it."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

import timm
import torch
import yaml
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import batude_fx
from batude_fx import Recipe
from batude_fx.compression.recipe_preview import preview
from batude_fx.evaluation.image_folder import batches, image_paths, read_image
from batude_fx.graph.example_inputs import example_inputs
from batude_fx.graph.flops import count_flops
from batude_fx.report import html_page, record, sweep_points
from batude_fx.saving.config import network_folder, read_config
from batude_fx.training import checkpoint_file
from batude_fx_cli.tables import saved_table
from tests.fuzz.bases import PHOTOS, RUN
from tests.fuzz.image_files import SUFFIXES, image_file
from tests.fuzz.mutations import NUMBERS, TEXTS, dumps, mutate, mutate_bytes, mutate_json, mutate_safetensors, parse

Reading = Callable[[Path], object]


@dataclass(frozen=True)
class Kind:
    """A kind of damaged files.

    Attributes:
        count: Least number of cases.
        write: Writes the files of a case, from the folder of the valid ones, into an empty folder.
        readings: Name to function, of all the ways in which the folder is read.
    """

    count: int
    write: Callable[[Random, Path, Path], None]
    readings: dict[str, Reading]


def _write_saved_folder(random: Random, bases: Path, folder: Path) -> None:
    shutil.copytree(_one_of(bases / "saved", random), folder, dirs_exist_ok=True)
    names = random.choices(("config.json", "model.safetensors", "report.json", "sweep.json"), (8, 5, 2, 1), k=2)
    for name in dict.fromkeys(names[: random.choice((1, 1, 1, 2))]):
        if (path := folder / name).is_file():
            _damage(path, mutate_safetensors if name == "model.safetensors" else mutate_json, random)


def _damage(path: Path, mutated: Callable[[bytes, Random], bytes], random: Random) -> None:
    """Damage the content of a file; rarely, put something else than a file in its place."""
    content = path.read_bytes()
    if random.random() >= 0.03:
        path.write_bytes(mutated(content, random))
        return
    path.unlink()
    kind = random.randrange(4)
    if kind == 0:
        path.mkdir()
    elif kind == 1 and path.name != "config.json":  # which timm would wait for, before it asks batude_fx
        os.mkfifo(path)
    elif kind == 2:
        path.touch()


def _one_of(folder: Path, random: Random) -> Path:
    return random.choice(sorted(folder.iterdir()))


def _timm(folder: Path) -> nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def _info(folder: Path) -> None:
    """Do what `batude-fx info` does, in a table and as JSON."""
    config = read_config(folder)
    facts: dict[str, Any] = config.model_dump(exclude={"pretrained_cfg"})
    facts["bytes"] = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if config.model_args.library is not None:
        network = batude_fx.load(folder)
        facts["flops"] = count_flops(network, example_inputs(network))
    Console(file=StringIO(), width=100).print(saved_table(folder, facts))
    json.dumps(facts)


def _report_of_saved_folder(folder: Path) -> None:
    """Write the report, but once for the same content: it depends on two files, one of which few cases damage."""
    names = (record.FILE, sweep_points.FILE)
    contents = tuple((folder / name).read_bytes() if (folder / name).is_file() else None for name in names)
    if contents not in _WRITTEN:
        _report(folder)
        _WRITTEN.add(contents)


_WRITTEN: set[tuple[bytes | None, ...]] = set()


def _report(folder: Path) -> None:
    """Do what `batude-fx report` does."""
    html_page.write_pages(network_folder(folder))
    page = folder / html_page.PAGE
    if page.is_file() and "<script" in page.read_text(encoding="utf-8"):
        raise AssertionError("a text of the report became a part of the page")


def _write_report(random: Random, bases: Path, folder: Path) -> None:
    source = bases / "saved" / "trained" if random.random() < 0.5 else _one_of(bases / "saved", random)
    for name in ("report.json", "sweep.json"):
        if (source / name).is_file():
            shutil.copy(source / name, folder)
    damaged = "sweep.json" if random.random() < 0.25 and (folder / "sweep.json").is_file() else "report.json"
    _damage(folder / damaged, mutate_json, random)
    if random.random() < 0.25 and damaged == "sweep.json":
        (folder / "report.json").unlink()


_YAML = (
    "!!python/object/apply:os.system ['x']", "!!binary aGk=", "!!set {a, b}", "&a [*a]", "*a", "<<: *a", "{", "[",
    "- -", "|", ">", "'", '"', "? x",
    "%YAML 1.1", "---", "...", "\t", "0x", "0b", "0o9", "1_000", "1:30:00", "~", "yes", ".nan",
    ".inf", "[" * 400 + "]" * 400, "{a: " * 19 + "1" + "}" * 19,
    "&a " + "x" * 1000, "# x", ": :", "=",
)  # fmt: skip


def _write_recipe(random: Random, bases: Path, folder: Path) -> None:
    shipped = sorted((bases / "recipes").iterdir())
    path = random.choice([*shipped, *[bases / "recipes" / "tiny.yaml"] * len(shipped)])
    text = path.read_text(encoding="utf-8")
    kind = random.randrange(10)
    if kind == 0:
        content = mutate_bytes(text.encode(), random)
    elif kind < 5:
        content = _mutate_lines(text, random).encode("utf-8", "surrogatepass")
    else:
        values = mutate(parse(_as_json(text)), random)
        content = dumps(values).encode("utf-8", "surrogatepass")
    (folder / "recipe.yaml").write_bytes(content)


@cache
def _as_json(text: str) -> str:
    return json.dumps(yaml.safe_load(text))


def _mutate_lines(text: str, random: Random) -> str:
    """Damage a recipe line by line: values replaced, keys renamed, lines moved, repeated, cut or indented."""
    lines = text.splitlines()
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        at = random.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        value = str(random.choice(random.choice((NUMBERS, TEXTS, _YAML))))
        changes: tuple[list[str], ...] = (
            [f"{key}{colon} {value}"], [f"{key}{colon} {value}"], [f"{key}{colon} {value}"], [], [lines[at]] * 2,
            [lines[at]] * 3000, [" " + lines[at]], [lines[at].strip()], ["  " * random.choice((1, 2, 60)) + value],
            [f"{value}{colon} 1"], [lines[at], value],
        )  # fmt: skip
        lines[at : at + 1] = random.choice(changes)
        lines = lines or [""]
    return "\n".join(lines) + "\n"


def _read_recipe(folder: Path) -> None:
    """Read a recipe, and do what `train --dry-run` does where the network is one that takes no seconds by itself."""
    recipe = Recipe.from_yaml(folder / "recipe.yaml")
    recipe.to_yaml()
    if recipe.model.name.startswith("test_"):
        json.dumps(preview(recipe).facts())


def _write_checkpoint(random: Random, bases: Path, folder: Path) -> None:
    shutil.copytree(bases / PHOTOS, folder / PHOTOS)
    run = folder / RUN
    run.mkdir()
    for name in ("recipe.yaml", "original.safetensors", "log.jsonl"):
        shutil.copy(bases / RUN / name, run)
    shutil.copy(_one_of(bases / "checkpoints", random), run / "checkpoint.safetensors")
    if random.random() < 0.1:
        _damage(run / random.choice(("recipe.yaml", "original.safetensors")), mutate_bytes, random)
    elif random.random() < 0.4:
        _damage(run / "checkpoint.safetensors", mutate_safetensors, random)
    else:
        _forge(run / "checkpoint.safetensors", random)


def _forge(path: Path, random: Random) -> None:
    """Change the content of a checkpoint; its checksum is right nine times out of ten."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        text: str = file.metadata()["tree"]
    if random.random() < 0.3:
        _change_a_tensor(tensors, random)
    else:
        tree = parse(text)
        entries = _pairs(tree)
        small = [entry for entry in entries if entry[0] != "parts"]  # the parts would take most of the damage
        entry = random.choice(entries if random.random() < 0.5 else small)
        entry[1] = mutate(entry[1], random)
        text = dumps(tree)
    text = text.encode("utf-8", "replace").decode()
    checksum = checkpoint_file._checksum(text, tensors) if random.random() < 0.9 else "0" * 64
    save_file(tensors, path, {"tree": text, "checksum": checksum})


def _pairs(packed: Any) -> list[Any]:
    """Return the keys and values of a dict as checkpoints pack it."""
    return next(value for key, value in packed if key == "pairs")


def _change_a_tensor(tensors: dict[str, torch.Tensor], random: Random) -> None:
    name = random.choice(sorted(tensors))
    old = tensors[name]
    other = random.choice((
        old.flatten()[:-1], old.reshape(-1), old.double(), old.bool(), torch.full_like(old.float(), torch.nan), -old,
        torch.full_like(old.float(), 3e38), torch.zeros_like(old), old.reshape(-1)[:0], torch.tensor(-(2**63)),
        torch.stack([old, old]), torch.zeros(3000, 3000),
    ))  # fmt: skip
    if random.random() < 0.1:
        del tensors[name]
    else:
        tensors[name] = other.clone().contiguous()


def _resume(folder: Path) -> None:
    run = folder / RUN
    batude_fx.run(recipe_of_the_run(), run, resume=True)


@cache
def recipe_of_the_run() -> Recipe:
    """Return the recipe that the user resumes with, which is not damaged."""
    return Recipe.from_yaml(Path(os.environ[BASES]) / RUN / "recipe.yaml")


BASES = "BATUDE_FX_FUZZ_BASES"
"""The environment variable that names the folder of the valid files."""


def _write_image(random: Random, bases: Path, folder: Path) -> None:
    (folder / f"image{random.choice(SUFFIXES)}").write_bytes(image_file(random))


def _read_image(folder: Path) -> None:
    assert all(read_image(path).mode == "RGB" for path in image_paths(folder))


def _read_grey_image(folder: Path) -> None:
    assert all(read_image(path, "L").mode == "L" for path in image_paths(folder))


def _batches(folder: Path) -> None:
    assert all(len(batch) == 1 for batch in batches(_network(), image_paths(folder)))


@cache
def _network() -> nn.Module:
    return timm.create_model("test_resnet")


KINDS = {
    "saved folders": Kind(
        3000,
        _write_saved_folder,
        {"load": batude_fx.load, "timm": _timm, "info": _info, "report": _report_of_saved_folder},
    ),
    "recipes": Kind(3000, _write_recipe, {"from_yaml and preview": _read_recipe}),
    "reports": Kind(500, _write_report, {"report": _report}),
    "checkpoints": Kind(500, _write_checkpoint, {"resume": _resume}),
    "images": Kind(200, _write_image, {"colour": _read_image, "grey": _read_grey_image, "batches": _batches}),
}
