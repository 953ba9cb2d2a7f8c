"""A recipe trained by two processes, as on two GPUs; here they share the CPU.

python -m examples.several_gpus [FOLDER]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from examples.digits import write_digits

SETTINGS = ["pretrain.epochs=1", "one_shot.epochs=2", "finalize.epochs=1"]


def main(folder: Path) -> None:
    """Launch the processes, then read the result of the run."""
    write_digits(folder / "digits")
    changes = [f"--set={setting}" for setting in (f"data.root={folder / 'digits'}", *SETTINGS)]
    # With GPUs: accelerate launch --multi_gpu --num_processes 2 -m batude_fx train ...
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "--num_machines=1"]
    train = ["-m", "batude_fx", "train", "digits-demo", f"--output={folder / 'run'}", *changes]
    subprocess.run([*launch, "--mixed_precision=no", "--dynamo_backend=no", *train], check=True)  # noqa: S603 - as above

    result = json.loads((folder / "run" / "result.json").read_text(encoding="utf-8"))
    print(f"{result['flops']:,} of {result['dense_flops']:,} flops; ranks:", result["ranks"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Two processes train one network.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo-out/two"), help="output folder")
    main(parser.parse_args().folder)
