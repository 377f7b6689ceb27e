"""The factor of attention scores as a field of config.json."""

from typing import Any

from megatron.core.models.huggingface.tables import ConfigRow, Fields, Options


def attention_scale(name: str, default: float) -> ConfigRow:
    """Return the row of a factor that is said, where ours is 1 / sqrt(head size) if not set."""

    def read(fields: Fields) -> dict[str, Any]:
        size = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
        return {"softmax_scale": None if fields[name] == size**-0.5 else fields[name]}

    def write(options: Options) -> dict[str, Any]:
        size = options["kv_channels"] or options["hidden_size"] // options["num_attention_heads"]
        scale = options["softmax_scale"]
        return {name: size**-0.5 if scale is None else scale}

    return ConfigRow({name: default}, read, write)
