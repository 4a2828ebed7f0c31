#!/usr/bin/env bash
# Builds the wheels (the full one, and the one of the torch operators alone), installs each in a clean environment with
# nothing of this checkout in it, and uses it there. PY is the interpreter that builds.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-python3}
OUT=build/wheel
VENV=$OUT/venv
unset PYTHONPATH
rm -rf $OUT
mkdir -p $OUT

# The full one as `pip install .` builds it, isolated, so that a missing build requirement shows. The constraint only keeps
# its torch from being a larger one than ours.
"$PY" -c 'from importlib.metadata import version; print("torch==" + version("torch").split("+")[0])' > $OUT/constraint.txt
PIP_CONSTRAINT=$OUT/constraint.txt PIP_BUILD_CONSTRAINT=$OUT/constraint.txt \
  "$PY" -m pip wheel --quiet . --no-deps -w $OUT/full
KIMI_OPS_ONLY=true "$PY" -m pip wheel --quiet . --no-build-isolation --no-deps -w $OUT/ops
ls -l $OUT/full $OUT/ops | grep whl

"$PY" scripts/venv.py make $VENV --no-source # torch, nothing else
python=$PWD/$VENV/bin/python
for wheel in $OUT/full/*.whl $OUT/ops/*.whl; do
  echo "== $(basename "$wheel")"
  "$python" -m pip install --quiet --force-reinstall --no-deps "$wheel"
  "$python" -m pip install --quiet "$wheel" # what it depends on
  "$python" -m pip check
  (cd / && "$python" - "$wheel") <<'PYTHON'
import shutil
import sys
from importlib.metadata import version

import torch

import kimi_native

x = torch.randn(4, 64)
out = kimi_native.ops.rms_norm(x, torch.ones(64))
torch.testing.assert_close(out, torch.nn.functional.rms_norm(x, (64,), eps=1e-5))
assert kimi_native.__version__ == version("kimi-native")
assert "site-packages" in kimi_native.__file__, kimi_native.__file__
cuda = torch.ops.kimi_native.cuda_build()
assert (cuda == "none") == (shutil.which("nvcc") is None), cuda
assert (kimi_native._C is None) == ("py3-none" in sys.argv[1]), kimi_native._C
print(f"kimi_native {kimi_native.__version__} from {kimi_native.__file__}: rms_norm is right, CUDA {cuda}, _C is {kimi_native._C}")
PYTHON
  (cd / && "$(dirname "$python")/kimi-native" info)
done
