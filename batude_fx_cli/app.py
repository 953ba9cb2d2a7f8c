"""The command line: arguments to one call, and its result as a table or as JSON. No logic of its own.

It is a package beside `batude_fx`, not inside it: `import batude_fx` brings in torch and timm, and `batude-fx --help`
must answer without them. For the same reason every command imports what it needs when it runs.
"""

from dataclasses import asdict
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batude_fx_cli import recipe_commands
from batude_fx_cli.terminal import one_line_errors, print_line, say, show

if TYPE_CHECKING:
    from batude_fx import Plan

app = typer.Typer(
    help="Make timm and torchvision networks smaller, to a budget.\n\n"
    "MODEL is a timm name (resnet50, or for a network of your own local-dir:FOLDER or hf-hub:USER/NAME), a torchvision "
    "name (torchvision:resnet50) or a folder that `batude-fx compress` wrote. Flops are multiply-adds, as fvcore "
    "counts them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:  # noqa: FBT001 - typer calls it with the value of the option
    if asked:
        typer.echo(f"batude-fx {version('batude-fx')}")
        raise typer.Exit


@app.callback()
def _main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before any command."""


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
    import batude_fx
    from batude_fx.graph.site_table import sites_table
    from batude_fx_cli.inputs import network_by_name

    network = network_by_name(model, "cpu", pretrained=False)
    sites = batude_fx.discover(network, layers=layers.value, include=include or (), exclude=exclude or ())
    show(sites_table(sites, model), [asdict(site) for site in sites], as_json)


@app.command("plan")
@one_line_errors
def plan_ranks(
    model: Model, budget: BudgetOption = None, params: Params = None, latency: Latency = None,
    calibration: Calibration = "synthetic", images: Count = 256, layers: LayersOption = Layers.CONV,
    include: Include = None, exclude: Exclude = None, round_to: RoundTo = "8", pretrained: Pretrained = True,
    device: Device = "cpu", as_json: AsJson = False,
) -> None:  # fmt: skip
    """Decide ranks under a budget and show them; nothing is written.

    Example: batude-fx plan resnet50 --budget 2.5x
    """
    from batude_fx.compression.plan import plan_table
    from batude_fx_cli.inputs import calibration_source, make_plan, network_by_name, parse_limits

    limits = parse_limits(budget, params, latency)  # before any weights are fetched
    source = calibration_source(calibration, images)
    network = network_by_name(model, device, pretrained=pretrained)
    plan = make_plan(network, limits, source, layers.value, include, exclude, round_to)
    show(plan_table(plan), _plan_facts(plan), as_json)


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
    import batude_fx
    from batude_fx.compression.plan import plan_table
    from batude_fx.saving.saved_folder import check_folder
    from batude_fx.support.numbers import human
    from batude_fx_cli.inputs import calibration_source, make_plan, network_by_name, parse_limits

    limits = parse_limits(budget, params, latency)  # before any weights are fetched
    source = calibration_source(calibration, images)
    check_folder(output)
    network = network_by_name(model, device, pretrained=pretrained)
    plan = make_plan(network, limits, source, layers.value, include, exclude, round_to)
    batude_fx.save(plan.apply(network), output)
    show(plan_table(plan), {**_plan_facts(plan), "output": str(output)}, as_json)
    if not as_json:
        print_line(f"saved to {output}: {human(_bytes_inside(output))}B")


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
    import batude_fx
    from batude_fx.deploy.export import check_path
    from batude_fx.evaluation.image_folder import batches, image_paths
    from batude_fx.support.numbers import human
    from batude_fx.support.tables import facts_table
    from batude_fx_cli.inputs import network_by_name

    check_path(output, int8=int8 is not None)  # before any weights are fetched
    paths = None if int8 is None else image_paths(int8, images)
    network = network_by_name(model, "cpu", pretrained=pretrained)
    photos = None if paths is None else batches(network, paths)
    difference = batude_fx.export(network, output, int8=photos)
    written = {output, output.with_suffix(".bin") if output.suffix == ".xml" else output}
    size = sum(file.stat().st_size for file in written)
    facts = {"output": str(output), "bytes": size, "difference": difference}
    rows = [("size", f"{human(size)}B"), ("largest difference of an output", f"{difference:.1e}")]
    show(facts_table(str(output), rows), facts, as_json)


@app.command()
@one_line_errors
def info(folder: Annotated[Path, typer.Argument(help="What `compress` wrote.")], as_json: AsJson = False) -> None:
    """Say what a saved folder holds: base network, ranks, flops, parameters, bytes.

    Example: batude-fx info small/
    """
    import batude_fx
    from batude_fx.graph.example_inputs import example_inputs
    from batude_fx.graph.flops import count_flops
    from batude_fx.saving.config import read_config
    from batude_fx_cli.tables import saved_table

    config = read_config(folder)
    facts: dict[str, Any] = config.model_dump(exclude={"pretrained_cfg"})
    facts["bytes"] = _bytes_inside(folder)
    if config.model_args.library is not None:
        network = batude_fx.load(folder)
        facts["flops"] = count_flops(network, example_inputs(network))
    show(saved_table(folder, facts), facts, as_json)


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
    from batude_fx.errors import UnsupportedError
    from batude_fx.evaluation import scores
    from batude_fx.support.tables import facts_table
    from batude_fx_cli.inputs import network_by_name

    photos = scores.find_photos(data)
    if against is None and not photos.labelled:
        raise UnsupportedError(f"{data} has no class subfolders, so there is no accuracy; give --against MODEL.")
    network = network_by_name(model, device, pretrained=True)
    other = None if against is None else network_by_name(against, device, pretrained=True)
    outputs = scores.logits(network, photos.paths)  # (N, classes)
    facts: dict[str, Any] = {"images": len(photos.paths)}
    try:
        truth = photos.labels(outputs.shape[1])
    except UnsupportedError as error:
        if against is None:
            raise UnsupportedError(f"{error}, or --against MODEL.") from None
        say(f"warning: {error}.", "yellow")
        truth = None
    if truth is not None:
        facts["top1"], facts["top5"] = scores.top1_and_top5(outputs, truth)
    if other is not None:
        others = scores.logits(other, photos.paths)
        if others.shape != outputs.shape:
            raise UnsupportedError(
                f"{model} has {outputs.shape[1]} classes, {against} has {others.shape[1]}; they cannot agree."
            )
        facts["agreement"] = scores.agreement(outputs, others)
    rows = [(key, f"{value:,}" if isinstance(value, int) else f"{value:.4g}") for key, value in facts.items()]
    show(facts_table(model, rows), facts, as_json)


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
    from batude_fx import Budget
    from batude_fx.evaluation import scores, sweep
    from batude_fx.report import html_page, sweep_points
    from batude_fx.saving.config import network_folder
    from batude_fx_cli.inputs import calibration_source, make_plan, network_by_name
    from batude_fx_cli.tables import sweep_table

    keeps, photos = sweep.parse_budgets(budgets), scores.find_photos(evaluate)
    source = calibration_source(calibration, images)
    if output:
        output = network_folder(output)
        sweep_points.make_writable(output)
    network = network_by_name(model, device, pretrained=pretrained)

    def plan_for(keep: float) -> "Plan":
        return make_plan(network, Budget(flops=keep), source, layers.value, include, exclude, round_to)

    plan = sweep.plan_tightest(plan_for, keeps) if round_to == "auto" else plan_for(keeps[-1])
    if output:
        html_page.check_network(output, plan.record())
    points = sweep.sweep(network, plan, keeps, photos)
    if output:
        sweep_points.write(points, output)
        html_page.write_pages(output)
    show(sweep_table(model, points), [asdict(point) for point in points], as_json)


@app.command("report")
@one_line_errors
def write_report(folder: Annotated[Path, typer.Argument(help="What `compress`, `train` or `sweep` wrote.")]) -> None:
    """Write report.html anew, and its pictures as PNG files.

    Example: batude-fx report small/
    """
    from batude_fx.report.html_page import write_pages
    from batude_fx.saving.config import network_folder

    for path in write_pages(network_folder(folder)):
        print_line(str(path))


def _plan_facts(plan: "Plan") -> dict[str, Any]:
    return {
        "model": plan.model_name, "calibration": plan.calibration, "dense_flops": plan.dense_flops,
        "flops": plan.flops, "dense_params": plan.dense_params, "params": plan.params,
        "dense_seconds": plan.dense_seconds, "seconds": plan.seconds, "round_to": plan.round_to,
        "ranks": {name: asdict(ranks) for name, ranks in plan.ranks.items()},
        "skipped": {site.name: site.skip_reason for site in plan.sites if site.skip_reason},
    }  # fmt: skip


def _bytes_inside(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


app.command()(recipe_commands.train)
app.add_typer(recipe_commands.recipes, name="recipes")
