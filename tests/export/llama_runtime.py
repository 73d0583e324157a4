"""llama.cpp for tests, through whichever of its Python packages is installed; both give the same four answers."""

import json
import urllib.request

import numpy as np


_LETTER = 50  # a token of all our tokenizers that is one letter: the server says nothing of parts of letters


class Server:
    """xllamacpp, which comes compiled: llama.cpp's own server, inside this process."""

    package = "xllamacpp"

    def __init__(self, path, context=512):
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = str(path)
        options.n_ctx, options.n_parallel, options.n_gpu_layers, options.port = context, 1, 0, 0
        options.warmup, options.verbosity, options.prompt_cache_all = False, 0, False
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
        options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = xllamacpp.Server(options)

    def tokenize(self, text):
        return self._post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def distribution(self, tokens, size):
        """Log-probability of every token of the vocabulary after these."""
        result = np.full(size, -np.inf)
        for entry in self._next(tokens, token=_LETTER, n_probs=size, cache_prompt=False)["top_logprobs"]:
            result[entry["id"]] = entry["logprob"]
        return result

    def greedy(self, tokens, new):
        return self._post("/completion", prompt=tokens, n_predict=new, temperature=0, return_tokens=True)["tokens"]

    def likelihoods(self, tokens):
        """Log-probability of each token but the first, after those in front of it; none may be a part of a letter."""
        return [self._next(tokens[:i], token=tokens[i], n_probs=1)["logprob"] for i in range(1, len(tokens))]

    def _next(self, tokens, token, **options):
        """What the server says of a token that it is made to sample: log-probabilities, as if it had not been."""
        options = {"n_predict": 1, "temperature": 0, "logit_bias": [[token, 1e6]], **options}
        return self._post("/completion", prompt=tokens, **options)["completion_probabilities"][0]

    def _post(self, path, **body):
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + path, data, headers)
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())


class Bindings:
    """llama-cpp-python, which pip compiles."""

    package = "llama_cpp"

    def __init__(self, path, context=512):
        import llama_cpp

        full = llama_cpp.GGML_TYPE_F32
        self.model = llama_cpp.Llama(
            str(path), n_ctx=context, n_batch=context, n_ubatch=context, n_threads=1, n_threads_batch=1,
            logits_all=True, verbose=False, type_k=full, type_v=full,
        )  # fmt: skip

    def tokenize(self, text):
        return self.model.tokenize(text.encode(), add_bos=True, special=True)

    def distribution(self, tokens, size):
        return self._logprobs(tokens)[-1][:size]

    def greedy(self, tokens, new):
        self.model.reset()
        result = []
        for token in self.model.generate(tokens, temp=0.0, top_k=1, repeat_penalty=1.0, reset=True):
            result.append(token)
            if len(result) == new or token == self.model.token_eos():
                break
        return result

    def likelihoods(self, tokens):
        return [row[token] for row, token in zip(self._logprobs(tokens[:-1]), tokens[1:], strict=True)]

    def _logprobs(self, tokens):
        self.model.reset()
        self.model.eval(tokens)
        logits = np.asarray(self.model.scores[: len(tokens)], dtype=np.float64)
        peak = logits.max(-1, keepdims=True)
        return logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))


RUNTIMES = (Server, Bindings)
