"""Cost of the check against recomputing the layer, side by side; prints milliseconds and the ratio."""

import time

import numpy as np
from fides_freivalds import LinearCheck


def median_ms(call, repeats=31):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1000)
    return float(np.median(times))


def main():
    rng = np.random.default_rng(0)
    print(f"{'D x K':>12} {'rows':>5} {'recompute':>10} {'check':>8} {'ratio':>6} {'honest residual':>16}")
    for d, k in ((512, 10), (2048, 1000), (4096, 4096)):
        weight = rng.normal(0, d**-0.5, (d, k))
        check = LinearCheck(weight, np.zeros(k))
        for n in (1, 32, 256):
            x = rng.normal(0, 1, (n, d)).astype(np.float32)
            # The service computes in float32, as servers do; recomputing is timed in float32 as well.
            weight32 = weight.astype(np.float32)
            claimed = (x @ weight32).astype(np.float64)
            wide = x.astype(np.float64)
            again = median_ms(lambda x=x, w=weight32: x @ w)
            spent = median_ms(lambda x=wide, z=claimed, c=check: c.residual(x, z))
            worst = check.residual(wide, claimed).max()
            print(f"{d:>6} x {k:<4} {n:>5} {again:>10.3f} {spent:>8.3f} {spent / again:>6.2f} {worst:>16.1e}")


if __name__ == "__main__":
    main()
