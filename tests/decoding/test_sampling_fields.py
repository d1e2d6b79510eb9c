"""A row of the table of sampling fields is all that a new field needs to be everywhere."""

from __future__ import annotations

import json
import subprocess
import sys

TOY = """
from fasteagle_jax.decoding import sampling_fields as table

table.FIELDS["top_a"] = table.SamplingField("top_a", 0.0, "float32", 0, 1, "0 to 1", "A", "a toy; 0 for all")

# Whatever is made from the table is made when it is imported, which nothing above does.
import argparse
import json
from fasteagle_jax.commands.answers import sampling_params
from fasteagle_jax.commands.terminal import add_sampling_options
from fasteagle_jax.decoding.sampling import make_sampling
from fasteagle_jax.engine.batch_requests import read_requests
from fasteagle_jax.engine.requests import SamplingParams
from fasteagle_jax.engine.scheduler import Request, to_device_request
from fasteagle_jax.errors import UserError

def complaint(make):
    try:
        make()
    except UserError as error:
        return str(error)

line, bad, unknown = read_requests(
    [b'{"prompt": "a", "top_a": 0.5}', b'{"prompt": "a", "top_a": 2}', b'{"prompt": "a", "top_b": 2}'],
    SamplingParams(top_a=0.25),
)
parser = argparse.ArgumentParser()
parser.add_argument("--max-new", type=int, default=1)
add_sampling_options(parser, temperature=0.0)
request = Request(0, 0, (1,), line.params, (), 1, None, False)
array = to_device_request(request, 1).sampling.top_a
print(json.dumps({
    "params": SamplingParams(top_a=0.25).top_a,
    "params refuse": complaint(lambda: SamplingParams(top_a=-1)),
    "line": line.params.top_a,
    "line refuses": bad.message,
    "unknown": unknown.message,
    "options": sampling_params(parser.parse_args(["--top-a", "0.75"])).top_a,
    "no option": sampling_params(parser.parse_args([])).top_a,
    "device request": [array.dtype.name, array.tolist()],
    "device rows": make_sampling(2, top_a=[0.5, 1.0]).top_a.tolist(),
    "free rows": make_sampling(2).top_a.tolist(),
}))
"""


def test_one_row_of_the_table_adds_a_field_to_params_lines_options_and_device_arrays():
    ran = subprocess.run([sys.executable, "-c", TOY], check=True, capture_output=True, text=True)
    seen = json.loads(ran.stdout)
    unknown = seen.pop("unknown")
    assert unknown.startswith('"top_b" is unknown: leave it out, or give temperature, ') and "top_a" in unknown
    assert seen == {
        "params": 0.25,
        "params refuse": "top_a is -1: it must be 0 to 1",
        "line": 0.5,
        "line refuses": "top_a is 2.0: it must be 0 to 1",
        "options": 0.75,
        "no option": 0.0,
        "device request": ["float32", [0.5]],
        "device rows": [0.5, 1.0],
        "free rows": [0.0, 0.0],
    }
