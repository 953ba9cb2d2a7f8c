"""The commands of `batude-fx`: each makes one call of batude_fx and prints the result as a table or as JSON.

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
from batude_fx_cli.terminal import one_line_errors, print_line, print_to_stderr, show
from batude_fx_cli.timm_script import run_timm_script

if TYPE_CHECKING:
    from batude_fx import Plan

app = typer.Typer(
    help="Compress timm and torchvision networks to a budget of flops, parameters or time, by replacing convolutions "
    "with their Tucker-2 decompositions.\n\n"
    "MODEL is the name of a timm network (resnet50), of a torchvision network (torchvision:resnet50) or of a network "
    "that timm saved (local-dir:FOLDER, hf-hub:USER/NAME), or a folder that `batude-fx compress` wrote. One "
    "multiply-add is one flop, as fvcore counts them.",
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
    """Hold the options that stand before the command."""


class Layers(StrEnum):
    """The values of --layers."""

    CONV = "conv"
    CONV_LINEAR = "conv+linear"


def _parse_multiple(text: str) -> Any:  # noqa: ANN401 - the type of `round_to` in `plan`
    if text == "auto":
        return text
    if not text.isdigit() or int(text) < 1:
        raise typer.BadParameter(f'{text!r} is no rank multiple; use 1 or more, 8 by default, or "auto".')
    return int(text)


Model = Annotated[str, typer.Argument(help="Name in timm, torchvision:NAME, local-dir:FOLDER, or a saved folder.")]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        "-b",
        help='Limit on the flops: the fraction that remains (0.5), "40%", "2.5x" for 2.5 times fewer, or "0.9GFLOPs".',
    ),
]
Params = Annotated[
    str | None, typer.Option(help='Limit on the parameters, in the same forms: 0.5, "40%", "2.5x", or "12MParams".')
]
Latency = Annotated[
    str | None,
    typer.Option(
        help='Limit on the time of a forward pass, measured on this machine, in the same forms: 0.6, "1.8x", or "12ms".'
    ),
]
Agreement = Annotated[
    str | None,
    typer.Option(
        help="Find the smallest network that agrees with the original on this share of the images, 0.98 say; the lower "
        "end of the 95 % interval counts. Up to half of the images are held back to measure it."
    ),
]
Pretrained = Annotated[bool, typer.Option(help="Load trained weights, which timm and torchvision download.")]
InputSize = Annotated[
    int | None,
    typer.Option(
        help="Side of the images in pixels that the network will be used on, where it is not that of its "
        "configuration. Flops depend on it.", min=1, max=2048,
    ),
]  # fmt: skip
Device = Annotated[str, typer.Option(help="Device of torch: cpu, cuda, cuda:1 or mps.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
LayersOption = Annotated[Layers, typer.Option(help="Replace convolutions only, or linear layers too.")]
Include = Annotated[
    list[str] | None, typer.Option(help="Replace only layers whose name matches a glob (layer3.*); can be repeated.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Keep layers dense whose name matches a glob (layer1.*); can be repeated.")
]
RoundTo = Annotated[
    Any,
    typer.Option(
        help='Make ranks multiples of this number; "auto" times which suits this machine.', metavar="INTEGER|auto",
        parser=_parse_multiple,
    ),
]  # fmt: skip
Calibration = Annotated[
    str,
    typer.Option(
        help="Images by which the best ranks are predicted: a folder of images without labels and its subfolders, "
        '"synthetic" (generated images), or "none" (the weights alone decide).'
    ),
]
_NO_LIMIT = "1e6TFLOPs"  # a plan without a budget, for its measurements alone
Count = Annotated[int, typer.Option(help="Number of images to take from the folder, evenly spread.", min=1)]


@app.command()
@one_line_errors
def discover(
    model: Model, layers: LayersOption = Layers.CONV, include: Include = None, exclude: Exclude = None,
    input_size: InputSize = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """List all convolutions of a network: sizes, costs, how each was found, and why it would stay dense.

    Example: batude-fx discover resnet50
    """
    import batude_fx
    from batude_fx.graph.site_table import sites_table
    from batude_fx_cli.inputs import network_by_name

    network = network_by_name(model, "cpu", pretrained=False, input_size=input_size)
    sites = batude_fx.discover(network, layers=layers.value, include=include or (), exclude=exclude or ())
    show(sites_table(sites, model), [asdict(site) for site in sites], as_json)


@app.command("plan")
@one_line_errors
def plan_ranks(
    model: Model, budget: BudgetOption = None, params: Params = None, latency: Latency = None,
    agreement: Agreement = None, calibration: Calibration = "synthetic", images: Count = 256,
    layers: LayersOption = Layers.CONV, include: Include = None, exclude: Exclude = None, round_to: RoundTo = "8",
    pretrained: Pretrained = True, device: Device = "cpu", input_size: InputSize = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Choose ranks that meet a budget and show them; nothing is written.

    Example: batude-fx plan resnet50 --budget 2.5x
    """
    from batude_fx.compression.plan import plan_table
    from batude_fx_cli.inputs import calibration_source, make_plan, network_by_name, parse_limits

    limits = parse_limits(budget, params, latency, agreement)  # before weights are downloaded
    source = calibration_source(calibration, images)
    network = network_by_name(model, device, pretrained=pretrained, input_size=input_size)
    plan = make_plan(network, limits, source, layers.value, include, exclude, round_to).measured(network)
    show(plan_table(plan), _plan_facts(plan), as_json)


@app.command()
@one_line_errors
def sensitivity(
    model: Model, calibration: Calibration = "synthetic", images: Count = 256,
    sites: Annotated[int, typer.Option(help="Number of sites to measure, the most expensive ones.", min=0)] = 10,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder that `compress` wrote for this network, to whose report they are added."
        ),
    ] = None,
    layers: LayersOption = Layers.CONV, include: Include = None, exclude: Exclude = None, round_to: RoundTo = "8",
    pretrained: Pretrained = True, device: Device = "cpu", input_size: InputSize = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Show what each layer alone costs when it is cut: as predicted, and as measured for the most expensive ones.

    Example: batude-fx sensitivity resnet50 --calibration photos/ --output small/
    """
    from batude_fx import Budget
    from batude_fx.compression.sensitivity import sensitivity_table
    from batude_fx.report import html_page
    from batude_fx.saving.config import network_folder
    from batude_fx_cli.inputs import calibration_source, make_plan, network_by_name

    source = calibration_source(calibration, images)
    if output:
        output = network_folder(output)
        html_page.check_report(output)
    network = network_by_name(model, device, pretrained=pretrained, input_size=input_size)
    plan = make_plan(network, Budget(flops=_NO_LIMIT), source, layers.value, include, exclude, round_to)
    if output:
        html_page.check_network(output, plan.record())
    found = plan.sensitivity(network, measured=sites)
    if output:
        html_page.add_sensitivity(output, found.sites)
    facts = {"rank_correlation": found.rank_correlation, "sites": [site.model_dump() for site in found.sites]}
    show(sensitivity_table(found), facts, as_json)


@app.command()
@one_line_errors
def compress(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the network.")],
    budget: BudgetOption = None,
    params: Params = None, latency: Latency = None, agreement: Agreement = None,
    calibration: Calibration = "synthetic", images: Count = 256,
    restore: Annotated[bool, typer.Option(
        "--restore", help="Let the original then teach the network on the images of --calibration, for minutes. "
        "Ctrl-C ends it with the best network so far.",
    )] = False,
    layers: LayersOption = Layers.CONV, include: Include = None, exclude: Exclude = None, round_to: RoundTo = "8",
    pretrained: Pretrained = True, device: Device = "cpu", input_size: InputSize = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Compress a network to a budget and save it in a folder.

    Example: batude-fx compress resnet50 --budget 0.5 --calibration photos/ --restore --output small/
    """
    import batude_fx
    from batude_fx.compression.checks import check_restorable
    from batude_fx.compression.plan import plan_table
    from batude_fx.saving.saved_folder import check_folder
    from batude_fx.support.numbers import human
    from batude_fx_cli.inputs import calibration_source, make_plan, network_by_name, parse_limits

    limits = parse_limits(budget, params, latency, agreement)  # before weights are downloaded
    source = calibration_source(calibration, images)
    if restore:
        check_restorable(has_images=calibration not in {"none", "synthetic"})
    check_folder(output)
    network = network_by_name(model, device, pretrained=pretrained, input_size=input_size)
    plan = make_plan(network, limits, source, layers.value, include, exclude, round_to)
    small, plan = plan.build(network, restore=restore)
    batude_fx.save(small, output)
    show(plan_table(plan), {**_plan_facts(plan), "output": str(output)}, as_json)
    if not as_json:
        print_line(f"saved to {output}: {human(_folder_bytes(output))}B")


@app.command()
@one_line_errors
def export(
    model: Model, output: Annotated[Path, typer.Argument(help="File to write: .onnx, .xml (OpenVINO) or .pt2.")],
    int8: Annotated[
        Path | None,
        typer.Option(help="Quantize to 8-bit integers, with ranges measured on this folder of images (ONNX only)."),
    ] = None,
    images: Count = 128,
    dynamic_size: Annotated[
        bool, typer.Option("--dynamic-size", help="Let the file take images of any size, if the network can.")
    ] = False,
    pretrained: Pretrained = True, input_size: InputSize = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Write a network as a file that runs without batude_fx.

    Batch normalization is folded into the convolutions, and the outputs of the file are compared with the network's.

    Example: batude-fx export small/ small.onnx
    """
    import batude_fx
    from batude_fx.deploy.export import check_path
    from batude_fx.evaluation.image_folder import batches, image_paths
    from batude_fx_cli.inputs import network_by_name
    from batude_fx_cli.tables import comparison_table

    check_path(output, int8=int8 is not None)  # before weights are downloaded
    paths = None if int8 is None else image_paths(int8, images)
    network = network_by_name(model, "cpu", pretrained=pretrained, input_size=input_size)
    photos = None if paths is None else batches(network, paths)
    comparison = batude_fx.export(network, output, int8=photos, dynamic_size=dynamic_size)
    files = {output, output.with_suffix(".bin") if output.suffix == ".xml" else output}
    size = sum(file.stat().st_size for file in files)
    facts = {"output": str(output), "bytes": size, **asdict(comparison), "interval": comparison.agreement_interval}
    show(comparison_table(str(output), size, comparison, on_noise=int8 is None), facts, as_json)


@app.command()
@one_line_errors
def info(folder: Annotated[Path, typer.Argument(help="What `compress` wrote.")], as_json: AsJson = False) -> None:
    """Show what a saved folder holds: the dense network's name, ranks, flops, parameters and bytes.

    Example: batude-fx info small/
    """
    import batude_fx
    from batude_fx.graph.example_inputs import example_inputs
    from batude_fx.graph.flops import count_flops
    from batude_fx.graph.provenance import attached_record
    from batude_fx.report.record import Record, read_or_warn
    from batude_fx.saving.config import read_config
    from batude_fx_cli.tables import saved_table

    config = read_config(folder)
    facts: dict[str, Any] = config.model_dump(exclude={"pretrained_cfg"})
    facts["bytes"] = _folder_bytes(folder)
    if config.model_args.library is not None:
        network = batude_fx.load(folder)
        facts["flops"] = count_flops(network, example_inputs(network))
        record = attached_record(network)
    else:
        record = read_or_warn(folder)
    known = record if isinstance(record, Record) else None
    facts["quality"] = known.quality.model_dump() if known and known.quality else None
    show(saved_table(folder, facts, known), facts, as_json)


@app.command()
@one_line_errors
def evaluate(
    model: Model, data: Annotated[Path, typer.Option(help="Folder of images; class subfolders give accuracy.")],
    against: Annotated[str | None, typer.Option(help="Another MODEL, whose predictions are compared.")] = None,
    device: Device = "cpu", input_size: InputSize = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure accuracy on images in one subfolder per class, or agreement with another network on any images.

    Agreement is the share of images for which both networks predict the same class.

    Example: batude-fx evaluate small/ --data imagenet/val --against resnet50
    """
    from batude_fx.errors import UnsupportedError
    from batude_fx.evaluation import scores
    from batude_fx.support.tables import facts_table
    from batude_fx_cli.inputs import network_by_name

    photos = scores.find_photos(data)
    if against is None and not photos.labelled:
        raise UnsupportedError(f"{data} has no class subfolders, so there is no accuracy; give --against MODEL.")
    network = network_by_name(model, device, pretrained=True, input_size=input_size)
    reference = None if against is None else network_by_name(against, device, pretrained=True, input_size=input_size)
    outputs = scores.logits(network, photos.paths)  # (N, classes)
    facts: dict[str, Any] = {"images": len(photos.paths)}
    try:
        truth = photos.labels(outputs.shape[1])
    except UnsupportedError as error:
        if against is None:
            raise UnsupportedError(f"{error}, or --against MODEL.") from None
        print_to_stderr(f"warning: {error}.", "yellow")
        truth = None
    if truth is not None:
        facts["top1"], facts["top5"] = scores.top1_and_top5(outputs, truth)
    if reference is not None:
        reference_outputs = scores.logits(reference, photos.paths)
        if reference_outputs.shape != outputs.shape:
            raise UnsupportedError(
                f"{model} has {outputs.shape[1]} classes, {against} has {reference_outputs.shape[1]}; they cannot be "
                "compared."
            )
        facts["agreement"] = scores.agreement(outputs, reference_outputs)
    rows = [(key, f"{value:,}" if isinstance(value, int) else f"{value:.4g}") for key, value in facts.items()]
    show(facts_table(model, rows), facts, as_json)


@app.command("sweep")
@one_line_errors
def sweep_budgets(
    model: Model, evaluate: Annotated[Path, typer.Option(help="Folder of images; class subfolders give accuracy.")],
    budgets: Annotated[
        str, typer.Option(help="Fractions of the flops that remain: first:last:step, or a list with commas.")
    ] = "0.3:0.9:0.1",
    calibration: Calibration = "synthetic", images: Count = 256,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write sweep.json and sweep.png to.")
    ] = None,
    layers: LayersOption = Layers.CONV, include: Include = None, exclude: Exclude = None, round_to: RoundTo = "8",
    pretrained: Pretrained = True, device: Device = "cpu", input_size: InputSize = None, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Compress to several budgets and measure each: agreement with the original, accuracy, flops and milliseconds.

    If the output folder is one that `compress` wrote, its report.html shows the measurements too.

    Example: batude-fx sweep resnet50 --budgets 0.3:0.9:0.1 --calibration photos/ --evaluate more-photos/
    """
    from batude_fx import Budget
    from batude_fx.compression import sweep
    from batude_fx.evaluation import scores
    from batude_fx.report import html_page, sweep_points
    from batude_fx.saving.config import network_folder
    from batude_fx_cli.inputs import calibration_source, make_plan, network_by_name
    from batude_fx_cli.tables import sweep_table

    keeps, photos = sweep.parse_budgets(budgets), scores.find_photos(evaluate)
    source = calibration_source(calibration, images)
    if output:
        output = network_folder(output)
        sweep_points.check_folder(output)
    network = network_by_name(model, device, pretrained=pretrained, input_size=input_size)

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
def write_report(
    folder: Annotated[Path, typer.Argument(help="What `compress`, `train` or `sweep` wrote.")],
) -> None:
    """Write report.html again, and its pictures as PNG files.

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
        "quality": plan.quality.model_dump() if plan.quality else None,
        "search": plan.search.model_dump() if plan.search else None,
        "restoration": plan.restoration.model_dump() if plan.restoration else None,
        "ranks": {name: asdict(ranks) for name, ranks in plan.ranks.items()},
        "skipped": {site.name: site.skip_reason for site in plan.sites if site.skip_reason},
    }  # fmt: skip


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


_PASSED_ON = {"allow_interspersed_args": False, "ignore_unknown_options": True}  # to the script
app.command("timm", context_settings=_PASSED_ON)(run_timm_script)
app.command()(recipe_commands.train)
app.add_typer(recipe_commands.recipes, name="recipes")
