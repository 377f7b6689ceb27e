"""The parameter of attention sinks: one logit a head that takes weight and gives no value."""

import torch
from torch import nn
from torch.distributed import ProcessGroup

from megatron.core.param_role import ParamRole, Split, set_role
from megatron.core.transformer.init_rules import input_init
from megatron.core.transformer.precision import params_dtype
from megatron.core.transformer.transformer_config import TransformerConfig


def learnt_sink(config: TransformerConfig, tp: ProcessGroup) -> nn.Parameter:
    """Return the sinks of this rank's heads, [heads / ranks], drawn as weights are."""
    heads, ranks = config.num_attention_heads, tp.size()
    split = Split(over="tp", index=tp.rank(), count=ranks, dim=0, parts=(heads,))
    role = ParamRole(init=input_init(config), split=split, decays=False)
    return set_role(nn.Parameter(torch.empty(heads // ranks, dtype=params_dtype(config))), role)
