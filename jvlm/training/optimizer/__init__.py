"""Optimizers: from the gradients of the trainable parameters to their updates, by an `OptimizerConfig`.

- `config`: the settings, and the learning rate of each parameter.
- `schedules`: the learning rate over the steps.
- `clipping`: gradient norms and their limits.
- `directions`: AdamW, Muon, Lion, Adafactor; `eight_bit`: AdamW with 8-bit moments.
- `ema`: the moving average of the parameters.
- `build`: all of it as one optax transformation.
"""

from jvlm.training.optimizer.build import make
from jvlm.training.optimizer.clipping import tower_norms
from jvlm.training.optimizer.config import OptimizerConfig, tower_of
from jvlm.training.optimizer.ema import ema_of

__all__ = ["OptimizerConfig", "ema_of", "make", "tower_norms", "tower_of"]
