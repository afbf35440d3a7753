"""The TPU kernels of the delta rule, compiled ahead of time.

They fit, and their code stays as short as it was. The compilers come as packages (the extra `aot`);
nothing can be executed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# Static bundles per token and head, and spilling stores of a grid step, as measured
# (docs/benchmarks.md) and a tenth.
BOUNDS = {
    ('v5e', 'forward'): (25.5, 380), ('v5e', 'backward'): (39.5, 1880),
    ('v5p', 'forward'): (26.0, 380), ('v5p', 'backward'): (40.5, 1880),
    ('v6e', 'forward'): (20.5, 510), ('v6e', 'backward'): (33.0, 1780),
}


@pytest.mark.extras
@pytest.mark.parametrize('value_heads', [16, 32])
def test_kernels_fit_and_stay_short(value_heads):
  pytest.importorskip('libtpu', reason='needs the extra aot')
  command = [
      sys.executable, 'benchmarks/fg2_gdn_tpu.py', '--json', '--chunks', '64', '--heads', '4',
      '--key-heads', '16', '--value-heads', str(value_heads)]
  environment = {k: v for k, v in os.environ.items()
                 if k not in ('XLA_FLAGS', 'JAX_DISABLE_MOST_OPTIMIZATIONS')}
  done = subprocess.run(
      command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr[-2000:]
  cases = [json.loads(line) for line in done.stdout.splitlines()]
  assert {(c['chip'], c['kernel']) for c in cases} == set(BOUNDS)
  for c in cases:
    bundles, spills = BOUNDS[c['chip'], c['kernel']]
    assert c['bundles_per_token'] <= bundles and c['spills'] <= spills, c
    assert c['bundles_per_token'] > 1, 'nothing was parsed'
