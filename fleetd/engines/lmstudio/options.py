"""The options of the engine `lmstudio`, and the options of a load."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from fleetd.config.schema.types import FieldType
from fleetd.engines.load_options import COUNT, SWITCH
from fleetd.engines.option_types import Count, Secret, Switch
from fleetd.engines.options import Options

LOAD_OPTIONS: Mapping[str, FieldType] = {
    "context_length": COUNT,
    "eval_batch_size": COUNT,
    "flash_attention": SWITCH,
    "num_experts": COUNT,
    "offload_kv_cache_to_gpu": SWITCH,
}


class LmStudioOptions(Options):
    """Defaults of a load, and how the server is reached."""

    context_length: Count | None = Field(None, description="tokens of a loaded model")
    eval_batch_size: Count | None = Field(None, description="tokens of one compute step")
    flash_attention: Switch | None = Field(None, description="use flash attention")
    num_experts: Count | None = Field(None, description="active experts of a mixture of experts")
    offload_kv_cache_to_gpu: Switch | None = Field(None, description="keep the KV cache in GPU memory")
    concurrency: Count = Field(4, description="requests that one model processes at once")
    cors: Switch = Field(False, description="allow requests from web pages of other origins")
    api_key: Secret | None = Field(None, description="sent as a bearer token")
