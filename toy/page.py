"""One file to play with: the trained networks of `toy.flow2d`, run by the browser that opens it.

    python -m toy.page                                        # trains three densities: six minutes
    python -m toy.page --results out/checkerboard out/spiral  # takes networks that `toy.flow2d --out` left

Fills the template toy/page.html with each density and its four networks. The result needs no server and asks
none: what it shows it computes.
"""

import argparse
import base64
import json
import tempfile
import zlib
from pathlib import Path

import torch

from full.files import read_json, read_tensors, write
from full.options import command, positive, seed_value
from toy import flow2d, plots

STARTS = {"teacher": None, "consistency": "teacher", "anyflow-forward": "teacher",
          "anyflow": "anyflow-forward"}  # each network, and the one whose weights it was trained from
DENSITIES = ("checkerboard", "mixture", "spiral")  # there is room for three
BITS = 18  # after the binary point
TEMPLATE = Path(__file__).with_suffix(".html")
LIMIT = 1_000_000  # bytes of the page

def shapes():
    """{name: shape} of the parameters of `flow2d.MLP`, in the order in which `pack` writes them."""
    return {name: tuple(value.shape) for name, value in flow2d.MLP().named_parameters()}

def pack(networks):
    """{method: state dict} -> text: fixed point, less the network it started from, deflated, base64.

    Float32 makes 1.7 MB of twelve networks and float16 moves their answers by 2e-3. Rounded to 2^-18 they
    move by 5e-5, and since a student stays near its start, most upper bytes of the differences are zero.
    """
    rows = {name: torch.cat([state[key].flatten() for key in shapes()]).double().mul(2**BITS).round().long()
            for name, state in networks.items()}
    differences = torch.stack([row - rows.get(STARTS[name], 0) for name, row in rows.items()]).flatten()
    folded = (2 * differences) ^ (differences >> 63)  # 0, -1, 1, -2, ... -> 0, 1, 2, 3, ...
    planes = torch.stack([folded >> shift & 255 for shift in (24, 16, 8, 0)]).to(torch.uint8)
    return base64.b64encode(zlib.compress(planes.numpy().tobytes(), 9)).decode()

def load(folder):
    """The density that a folder of `toy.flow2d` is of, and its networks {method: state dict}."""
    found = read_json(folder / "results.json")
    density = found.get("density") if isinstance(found, dict) else None
    if density not in flow2d.DENSITIES:
        raise ValueError(f"{folder / 'results.json'} is of density {density!r}, expected one of "
                         + ", ".join(flow2d.DENSITIES))
    networks = {}
    for name in STARTS:
        path = folder / "networks" / f"{name}.safetensors"
        networks[name] = state = read_tensors(path, *shapes())
        for key, shape in shapes().items():
            if state[key].shape != shape:
                raise ValueError(f"{path}: {key} has shape {tuple(state[key].shape)}, expected {shape}")
    return density, networks

def trained(density, steps, seed):
    """Networks {method: state dict} of a density, by the stages of `flow2d.train`."""
    networks, _ = flow2d.train(flow2d.DENSITIES[density](), list(STARTS), steps, 512, seed)
    return {name: networks[name].state_dict() for name in STARTS}

def page(networks):
    """The page of networks {density: {method: state dict}}. ValueError where it comes out too large."""
    model, densities = flow2d.MLP(), {}
    for name, states in networks.items():
        density = flow2d.DENSITIES[name]()
        densities[name] = dict(centres=density.centres.tolist(), size=density.size, shape=density.shape,
                               weights=pack(states))
    markers = {name: plots.STYLE[name]["marker"] for name in STARTS}
    data = dict(markers=markers, starts=STARTS, bits=BITS, gate=model.gate, space=model.space.tolist(),
                time=model.time.tolist(), shapes=shapes(), densities=densities)
    text = TEMPLATE.read_text().replace("{{data}}", json.dumps(data))
    if len(text.encode()) > LIMIT:
        raise ValueError(f"the page is {len(text.encode()):,} bytes, expected at most {LIMIT:,}")
    return text

def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m toy.page", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--results", nargs="+", type=Path, metavar="FOLDER",
        help="folders of toy.flow2d, one a density, with results.json and networks/ (default: train)")
    add("--steps", type=positive, default=5000, help="of training, as in toy.flow2d (default 5000)")
    add("--seed", type=seed_value, default=0, help="of training (default 0)")
    add("--out", type=Path, default=Path("out/explore.html"), help="the file (default out/explore.html)")
    return parser.parse_args(argv)

def run(args):
    if args.out.is_dir():
        raise ValueError(f"--out {args.out} is a folder, expected a file")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=args.out.parent):
        pass  # an unwritable place is found before the training
    networks = {}
    for density, states in (map(load, args.results) if args.results else
                            ((name, trained(name, args.steps, args.seed)) for name in DENSITIES)):
        if density in networks:
            raise ValueError(f"two folders of --results are of density {density}, expected one of each")
        networks[density] = states
    text = page(networks)
    write(args.out, lambda part: part.write_text(text))
    print(f"{args.out}: {len(text.encode()):,} bytes, densities {', '.join(networks)}")

def main(argv=None):
    args = parse(argv)
    command("toy.page", lambda: run(args), "no page is written")

if __name__ == "__main__":
    main()
