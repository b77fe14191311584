"""The rivals, each behind the interface of `nirvana.methods`; one file each.

ShortGPT removes whole layers and makes no plan of units: `nirvana.baselines.shortgpt.write_shortgpt`.
"""

from nirvana.baselines import flap, llm_pruner, lm_loss, magnitude, random, wanda_sp
from nirvana.methods import Method

METHODS: dict[str, Method] = {
    module.METHOD.name: module.METHOD for module in (random, magnitude, wanda_sp, flap, llm_pruner, lm_loss)
}
