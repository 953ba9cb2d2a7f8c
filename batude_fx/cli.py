"""The command line: arguments to one call, and its result as a table or as JSON. No logic of its own."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

import batude_fx
from batude_fx import cli_recipes, evaluation, exporting, page, report, sweep
from batude_fx import images as folder_images
from batude_fx.budget import Budget
from batude_fx.errors import BatudeError, UnsupportedError, first_line
from batude_fx.flops import count_flops
from batude_fx.saved_config import read_config
from batude_fx.serialization import check_folder
from batude_fx.terminal import one_line_errors, say, show
from batude_fx.zoo import example_inputs

app = typer.Typer(
    help="Make timm and torchvision networks smaller, to a budget.\n\n"
    "MODEL is a timm name (resnet50, or for a network of your own local-dir:FOLDER or hf-hub:USER/NAME), a torchvision "
    "name (torchvision:resnet50) or a folder that `batude-fx compress` wrote. Flops are multiply-adds, as fvcore "
    "counts them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class Layers(StrEnum):
    """Which layers are replaced."""

    CONV = "conv"
    CONV_LINEAR = "conv+linear"


def _multiple(text: str) -> Any:  # noqa: ANN401 - what plan takes
    if text == "auto":
        return text
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f'{text!r} is no rank multiple; use 1 or more, 8 by default, or "auto".')
    return int(text)


Model = Annotated[str, typer.Argument(help="timm name, local-dir:FOLDER, torchvision:NAME, or a saved folder.")]
BudgetOption = Annotated[
    str | None, typer.Option("--budget", help='What remains of the flops: 0.5, "2.5x", "40%", or "0.9GFLOPs".')
]
Params = Annotated[str | None, typer.Option(help='What remains of the parameters: 0.5, "2.5x", "40%", or "12MParams".')]
Latency = Annotated[
    str | None, typer.Option(help='What remains of the wall time of a run, measured here: 0.6, "1.8x", or "12ms".')
]
Pretrained = Annotated[bool, typer.Option(help="Fetch trained weights, as timm and torchvision do.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else.")]
LayersOption = Annotated[Layers, typer.Option(help="Replace convolutions only, or linear layers too.")]
Include = Annotated[list[str] | None, typer.Option(help="Glob over site names; repeat for several.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Glob over site names that stay dense; repeat for several.")]
RoundTo = Annotated[
    Any,
    typer.Option(
        help='Ranks are multiples of this; "auto" measures which suits this machine.', metavar="INTEGER|auto",
        parser=_multiple,
    ),
]  # fmt: skip
Calibration = Annotated[
    str, typer.Option(help='"synthetic", "none" (weights only), or a folder of unlabelled images (any depth).')
]
Count = Annotated[int, typer.Option(help="How many images of the folder to use, spread over it.", min=1)]


@app.command()
@one_line_errors
def discover(
    model: Model, layers: LayersOption = Layers.CONV, include: Include = None, exclude: Exclude = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """List every convolution: sizes, cost, how it was found, and why it would stay dense.

    Example: batude-fx discover resnet50
    """
    network = _network(model, "cpu", pretrained=False)
    sites = batude_fx.discover(network, layers=layers.value, include=include or (), exclude=exclude or ())
    show(report.sites_table(sites, model), [asdict(site) for site in sites], as_json)


@app.command()
@one_line_errors
def plan(
    model: Model, budget: BudgetOption = None, params: Params = None, latency: Latency = None,
    calibration: Calibration = "synthetic", images: Count = 256, layers: LayersOption = Layers.CONV,
    include: Include = None, exclude: Exclude = None, round_to: RoundTo = "8", pretrained: Pretrained = True,
    device: Device = "cpu", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Decide ranks under a budget and show them; nothing is written.

    Example: batude-fx plan resnet50 --budget 2.5x
    """
    limits, shown = _limits(budget, params, latency), _shown(calibration, images)  # before any weights are fetched
    network = _network(model, device, pretrained=pretrained)
    decided = _planned(network, limits, shown, layers, include, exclude, round_to)
    show(report.plan_table(decided), _plan_facts(decided), as_json)


@app.command()
@one_line_errors
def compress(
    model: Model, output: Annotated[Path, typer.Option(help="Folder to write.")], budget: BudgetOption = None,
    params: Params = None, latency: Latency = None, calibration: Calibration = "synthetic", images: Count = 256,
    layers: LayersOption = Layers.CONV, include: Include = None, exclude: Exclude = None, round_to: RoundTo = "8",
    pretrained: Pretrained = True, device: Device = "cpu", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Compress a network to a budget and save it.

    Example: batude-fx compress resnet50 --budget 0.5 --calibration photos/ --output small/
    """
    limits, shown = _limits(budget, params, latency), _shown(calibration, images)
    check_folder(output)
    network = _network(model, device, pretrained=pretrained)
    decided = _planned(network, limits, shown, layers, include, exclude, round_to)
    batude_fx.save(decided.apply(network), output)
    show(report.plan_table(decided), {**_plan_facts(decided), "output": str(output)}, as_json)
    if not as_json:
        written = sum(file.stat().st_size for file in output.iterdir() if file.is_file())
        Console().print(f"saved to {output}: {report.human(written)}B", markup=False, highlight=False)


@app.command()
@one_line_errors
def export(
    model: Model, output: Annotated[Path, typer.Argument(help="File to write: .onnx, .xml (OpenVINO) or .pt2.")],
    int8: Annotated[
        Path | None, typer.Option(help="Folder of unlabelled images: weights and activations become 8-bit integers.")
    ] = None,
    images: Count = 128, pretrained: Pretrained = True, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write a network as a file that runs without batude_fx, batch-norms folded, checked against the network.

    Example: batude-fx export small/ small.onnx
    """
    exporting.check(output, int8=int8 is not None)  # before any weights are fetched
    paths = None if int8 is None else folder_images.image_paths(int8, images)
    network = _network(model, "cpu", pretrained=pretrained)
    photos = None if paths is None else folder_images.batches(network, paths)
    difference = batude_fx.export(network, output, int8=photos)
    written = {output, output.with_suffix(".bin") if output.suffix == ".xml" else output}
    size = sum(file.stat().st_size for file in written)
    facts = {"output": str(output), "bytes": size, "difference": difference}
    rows = [("size", f"{report.human(size)}B"), ("largest difference of an output", f"{difference:.1e}")]
    show(report.facts_table(str(output), rows), facts, as_json)


@app.command()
@one_line_errors
def info(folder: Annotated[Path, typer.Argument(help="What `compress` wrote.")], as_json: AsJson = False) -> None:
    """Say what a saved folder holds: base network, ranks, flops, parameters, bytes.

    Example: batude-fx info small/
    """
    config = read_config(folder)
    facts: dict[str, Any] = config.model_dump(exclude={"pretrained_cfg"})
    facts["bytes"] = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    if config.model_args.library is not None:
        network = batude_fx.load(folder)
        facts["flops"] = count_flops(network, example_inputs(network))
    show(report.saved_table(folder, facts), facts, as_json)


@app.command()
@one_line_errors
def evaluate(
    model: Model, data: Annotated[Path, typer.Option(help="Folder of images; class subfolders give accuracy.")],
    against: Annotated[str | None, typer.Option(help="Another MODEL, to report agreement with.")] = None,
    device: Device = "cpu", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Accuracy on a folder of images in class subfolders, or agreement with another network.

    Example: batude-fx evaluate small/ --data imagenet/val --against resnet50
    """
    photos = evaluation.photos(data)
    if against is None and not photos.labelled:
        raise UnsupportedError(f"{data} has no class subfolders, so there is no accuracy; give --against MODEL.")
    network = _network(model, device, pretrained=True)
    other = None if against is None else _network(against, device, pretrained=True)
    outputs = evaluation.logits(network, photos.paths)  # (N, classes)
    facts: dict[str, Any] = {"images": len(photos.paths)}
    try:
        truth = photos.labels(outputs.shape[1])
    except UnsupportedError as error:
        if against is None:
            raise UnsupportedError(f"{error}, or --against MODEL.") from None
        say(f"warning: {error}.", "yellow")
        truth = None
    if truth is not None:
        facts["top1"], facts["top5"] = evaluation.scores(outputs, truth)
    if other is not None:
        others = evaluation.logits(other, photos.paths)
        if others.shape != outputs.shape:
            raise UnsupportedError(
                f"{model} has {outputs.shape[1]} classes, {against} has {others.shape[1]}; they cannot agree."
            )
        facts["agreement"] = evaluation.agreement(outputs, others)
    rows = [(key, f"{value:,}" if isinstance(value, int) else f"{value:.4g}") for key, value in facts.items()]
    show(report.facts_table(model, rows), facts, as_json)


@app.command("sweep")
@one_line_errors
def sweep_budgets(
    model: Model, evaluate: Annotated[Path, typer.Option(help="Folder of images; class subfolders give accuracy.")],
    budgets: Annotated[
        str, typer.Option(help="Fractions of flops that remain: first:last:step, or a list with commas.")
    ] = "0.3:0.9:0.1",
    calibration: Calibration = "synthetic", images: Count = 256,
    output: Annotated[Path | None, typer.Option(help="Folder for sweep.json and sweep.png.")] = None,
    layers: LayersOption = Layers.CONV, include: Include = None, exclude: Exclude = None, round_to: RoundTo = "8",
    pretrained: Pretrained = True, device: Device = "cpu", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Try several budgets, calibrating once: agreement with the original, accuracy, flops and milliseconds of each.

    The folder may be one that `compress` wrote: then its report.html shows the curves, too.

    Example: batude-fx sweep resnet50 --budgets 0.3:0.9:0.1 --calibration photos/ --evaluate more-photos/
    """
    keeps, photos, shown = sweep.fractions(budgets), evaluation.photos(evaluate), _shown(calibration, images)
    if output:
        output = page.network_folder(output)
        sweep.prepare(output)
    network = _network(model, device, pretrained=pretrained)

    def decide(keep: float) -> batude_fx.Plan:
        return _planned(network, Budget(flops=keep), shown, layers, include, exclude, round_to)

    decided = sweep.tightest(decide, keeps) if round_to == "auto" else decide(keeps[-1])
    if output:
        page.check_network(output, decided.record())
    points = sweep.sweep(network, decided, keeps, photos)
    if output:
        sweep.write(points, output)
        page.draw(output)
    show(report.sweep_table(model, points), [asdict(point) for point in points], as_json)


@app.command("report")
@one_line_errors
def write_report(folder: Annotated[Path, typer.Argument(help="What `compress`, `train` or `sweep` wrote.")]) -> None:
    """Write report.html anew, and its pictures as PNG files.

    Example: batude-fx report small/
    """
    for path in page.draw(page.network_folder(folder)):
        Console().print(str(path), markup=False, highlight=False, soft_wrap=True)


def _limits(budget: str | None, params: str | None, latency: str | None) -> Budget:
    if budget is not None and params is None and latency is None:
        return Budget.parse(budget)
    return Budget(flops=budget, params=params, latency=latency)


def _network(name: str, device: str, *, pretrained: bool) -> nn.Module:
    try:
        target = torch.device(device)
        torch.empty(1, device=target).cpu()  # "meta" has no values to copy
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedError(
            f"device {device!r} cannot be used here: {first_line(error)}. Use --device cpu."
        ) from error
    try:
        with redirect_stdout(sys.stderr):  # torch.hub says there what it fetches, in the way of --json
            torch.manual_seed(0)  # fresh weights are the same ones for plan and compress
            network = batude_fx.create(name, pretrained=pretrained).to(target)
            network.eval()
            return network
    except BatudeError:
        raise
    except Exception as error:  # timm's readers of foreign configs and names raise all kinds
        way_out = " All but evaluate do without its weights: --no-pretrained." if pretrained else ""
        raise BatudeError(f"{name!r} cannot be built: {type(error).__name__}: {first_line(error)}.{way_out}") from error


def _shown(wanted: str, count: int) -> Callable[[nn.Module], Any]:
    """From a network to what `plan` calibrates it with; a folder is looked into at once."""
    if wanted in {"none", "synthetic"}:
        return lambda _: None if wanted == "none" else wanted
    paths = folder_images.image_paths(Path(wanted), count)
    return lambda network: folder_images.batches(network, paths)


def _planned(
    network: nn.Module, budget: Budget, shown: Callable[[nn.Module], Any], layers: Layers, include: list[str] | None,
    exclude: list[str] | None, round_to: Any,  # noqa: ANN401 - what plan takes
) -> batude_fx.Plan:  # fmt: skip
    return batude_fx.plan(
        network, budget, calibration=shown(network), layers=layers.value, include=include or (), exclude=exclude or (),
        round_to=round_to,
    )  # fmt: skip


def _plan_facts(plan: batude_fx.Plan) -> dict[str, Any]:
    return {
        "model": plan.model_name, "calibration": plan.calibration, "dense_flops": plan.dense_flops,
        "flops": plan.flops, "dense_params": plan.dense_params, "params": plan.params,
        "dense_seconds": plan.dense_seconds, "seconds": plan.seconds, "round_to": plan.round_to,
        "ranks": {name: asdict(ranks) for name, ranks in plan.ranks.items()},
        "skipped": {site.name: site.skip_reason for site in plan.sites if site.skip_reason},
    }  # fmt: skip


app.command()(cli_recipes.train)
app.add_typer(cli_recipes.recipes, name="recipes")
