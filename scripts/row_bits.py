"""Show that what a Linear makes of a row depends, in the last bit, on how many rows there are.

Image-to-video has two noise levels, and 9 modulation rows of the model's width for each token. Computing them once for
each level, and not once for each token, would make a matmul of few rows out of one of many. This script prints, for the
widths of the AdaLN layers, the numbers of rows at which the result of the same row changes.

    python scripts/row_bits.py                    at release 2.3's widths, with one thread and with two
    python scripts/row_bits.py --threads 4 --device cuda
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = (1, 2, 4, 7, 8, 9, 12, 16, 24, 32, 48, 64, 105, 128, 256, 512, 1024, 4096)
WIDTHS = ((256, 4096), (4096, 4096), (4096, 9 * 4096), (256, 2048), (2048, 2048), (2048, 9 * 2048))
LEVELS = 2  # noise levels: the given frame's, and the others'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {options.device}")
    for threads in options.threads:
        torch.set_num_threads(threads)
        for dtype in (torch.float32, torch.bfloat16):
            for fan_in, fan_out in WIDTHS:
                where = changes(products(fan_in, fan_out, dtype, options.device))
                said = f"other bits at {', '.join(map(str, where))} rows" if where else "the same bits for all"
                print(f"{threads} threads, {str(dtype)[6:]:8} {fan_in:4} x {fan_out:5}: {said}", flush=True)


def products(fan_in: int, fan_out: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Repeat two rows, in turn, to each number of rows, and return what comes out of the first two."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(fan_out, fan_in, generator=generator).mul(fan_in**-0.5).to(device, dtype)
    x = torch.randn(LEVELS, fan_in, generator=generator).to(device, dtype)
    return [F.linear(x[torch.arange(max(n, LEVELS)) % LEVELS][:n], weight)[:LEVELS].cpu() for n in ROWS]


def changes(found: Sequence[Tensor]) -> list[int]:
    """Return the numbers of rows at which a row's result is not what it was for the number before."""
    return [
        n for n, x, before in zip(ROWS[1:], found[1:], found, strict=False) if not torch.equal(x[: len(before)], before)
    ]


if __name__ == "__main__":
    main()
