"""Hugging Face checkpoints, in and out, in both published formats, without a separate conversion step.

    load_config(dir), read_state(dir)      a whole model: OpenGVLab's InternVLChatModel or transformers' port of it
    read_vision_dir(dir)                   a bare ViT, to start native pre-training from
    read_llm_dir(dir)                      a bare language model, likewise
    save_pretrained(config, tensors, dir)  a directory that from_pretrained loads

Weights are safetensors only, streamed shard by shard; no code from a checkpoint is ever run.
"""

from evovlm.models.hf.files import token_ids, vocabulary
from evovlm.models.hf.load import detect, load_config, read_llm_dir, read_state, read_vision_dir, system_message
from evovlm.models.hf.names import Format, decoder_shapes, model_shapes, published_names, vision_shapes
from evovlm.models.hf.read_config import ConfigError
from evovlm.models.hf.save import save_pretrained
from evovlm.models.hf.shards import CheckpointError

__all__ = [
    "CheckpointError",
    "ConfigError",
    "Format",
    "decoder_shapes",
    "detect",
    "load_config",
    "model_shapes",
    "published_names",
    "read_llm_dir",
    "read_state",
    "read_vision_dir",
    "save_pretrained",
    "system_message",
    "token_ids",
    "vision_shapes",
    "vocabulary",
]
