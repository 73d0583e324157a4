"""What llama.cpp reads of a model with fewer tokens is its tokenizer and its rows."""

import pytest
import torch
from families import make_model
from gguf import GGUFReader
from kinds_of_tokenizers import TEXTS, tokenizer_of

from hf_structprune import CalibrationConfig, PruningConfig, StructuredPruner
from hf_structprune.export.gguf import export_gguf


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_the_file_holds_the_tokens_that_stay(kind, tmp_path):
    dense = tokenizer_of(kind)
    model = make_model("llama", vocab_size=len(dense), eos_token_id=2)
    config = PruningConfig(keep={"vocabulary": 640}, calibration=CalibrationConfig(texts=TEXTS))
    pruner = StructuredPruner(model, config, dense)
    pruner.prune()
    export_gguf(pruner.model, tmp_path / "model.gguf", quant="f32", tokenizer=pruner.tokenizer)
    reader = GGUFReader(tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tokens = [pruner.tokenizer.convert_ids_to_tokens(number) for number in range(640)]
    assert fields["tokenizer.ggml.tokens"] == tokens and len(fields["tokenizer.ggml.token_type"]) == 640
    assert fields["tokenizer.ggml.eos_token_id"] == pruner.tokenizer.eos_token_id
    if kind == "byte_level":
        merges = [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]]
        assert merges and {text for left, right in merges for text in (left, right, left + right)} <= {*tokens}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    rows = torch.from_numpy(tensors["token_embd.weight"].data.copy())
    assert torch.equal(rows, pruner.model.get_input_embeddings().weight.detach().to(rows.dtype))
