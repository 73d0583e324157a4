"""BibTeX of the methods that a pruned model was made with."""

from __future__ import annotations

from ..config import PruningConfig
from ..units.kinds import WIDTH_UNITS


_PAPERS = {
    "obs": """@inproceedings{hassibi1992second,
  title     = {Second order derivatives for network pruning: Optimal Brain Surgeon},
  author    = {Hassibi, Babak and Stork, David G.},
  booktitle = {Advances in Neural Information Processing Systems},
  volume    = {5},
  year      = {1992}
}""",
    "ziplm": """@inproceedings{kurtic2023ziplm,
  title     = {{ZipLM}: Inference-Aware Structured Pruning of Language Models},
  author    = {Kurtic, Eldar and Frantar, Elias and Alistarh, Dan},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023},
  url       = {https://huggingface.co/papers/2302.04089}
}""",
    "wanda": """@inproceedings{sun2024wanda,
  title     = {A Simple and Effective Pruning Approach for Large Language Models},
  author    = {Sun, Mingjie and Liu, Zhuang and Bair, Anna and Kolter, J. Zico},
  booktitle = {International Conference on Learning Representations},
  year      = {2024},
  url       = {https://huggingface.co/papers/2306.11695}
}""",
    "flap": """@inproceedings{an2024flap,
  title     = {Fluctuation-based Adaptive Structured Pruning for Large Language Models},
  author    = {An, Yongqi and Zhao, Xu and Yu, Tao and Tang, Ming and Wang, Jinqiao},
  booktitle = {Proceedings of the AAAI Conference on Artificial Intelligence},
  year      = {2024},
  url       = {https://huggingface.co/papers/2312.11983}
}""",
    "minitron": """@inproceedings{muralidharan2024minitron,
  title     = {Compact Language Models via Pruning and Knowledge Distillation},
  author    = {Muralidharan, Saurav and Sreenivas, Sharath Turuvekere and Joshi, Raviraj and others},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2024},
  url       = {https://huggingface.co/papers/2407.14679}
}""",
    "llm-pruner": """@inproceedings{ma2023llmpruner,
  title     = {{LLM-Pruner}: On the Structural Pruning of Large Language Models},
  author    = {Ma, Xinyin and Fang, Gongfan and Wang, Xinchao},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023},
  url       = {https://huggingface.co/papers/2305.11627}
}""",
    "magnitude": """@inproceedings{li2017pruning,
  title     = {Pruning Filters for Efficient {ConvNets}},
  author    = {Li, Hao and Kadav, Asim and Durdanovic, Igor and Samet, Hanan and Graf, Hans Peter},
  booktitle = {International Conference on Learning Representations},
  year      = {2017},
  url       = {https://huggingface.co/papers/1608.08710}
}""",
    "angular": """@inproceedings{gromov2025unreasonable,
  title     = {The Unreasonable Ineffectiveness of the Deeper Layers},
  author    = {Gromov, Andrey and Tirumala, Kushal and Shapourian, Hassan and Glorioso, Paolo and Roberts, Daniel A.},
  booktitle = {International Conference on Learning Representations},
  year      = {2025},
  url       = {https://huggingface.co/papers/2403.17887}
}""",
    "block_influence": """@article{men2024shortgpt,
  title   = {{ShortGPT}: Layers in Large Language Models are More Redundant Than You Expect},
  author  = {Men, Xin and Xu, Mingyu and Zhang, Qingyu and Wang, Bingning and Lin, Hongyu and others},
  journal = {arXiv preprint arXiv:2403.03853},
  year    = {2024},
  url     = {https://huggingface.co/papers/2403.03853}
}""",
    "shortened-llm": """@article{kim2024shortened,
  title   = {Shortened {LLaMA}: Depth Pruning for Large Language Models with Comparison of Retraining Methods},
  author  = {Kim, Bo-Kyeong and Kim, Geonmin and Kim, Tae-Ho and Castells, Thibault and others},
  journal = {arXiv preprint arXiv:2402.02834},
  year    = {2024},
  url     = {https://huggingface.co/papers/2402.02834}
}""",
    "slicegpt": """@inproceedings{ashkboos2024slicegpt,
  title     = {{SliceGPT}: Compress Large Language Models by Deleting Rows and Columns},
  author    = {Ashkboos, Saleh and Croci, Maximilian L. and do Nascimento, Marcelo Gennari and others},
  booktitle = {International Conference on Learning Representations},
  year      = {2024},
  url       = {https://huggingface.co/papers/2401.15024}
}""",
    "sleb": """@inproceedings{song2024sleb,
  title     = {{SLEB}: Streamlining {LLMs} through Redundancy Verification and Elimination of Transformer Blocks},
  author    = {Song, Jiwon and Oh, Kyungseok and Kim, Taesu and Kim, Hyungjun and Kim, Yulhwa and Kim, Jae-Joon},
  booktitle = {International Conference on Machine Learning},
  year      = {2024},
  url       = {https://huggingface.co/papers/2402.09025}
}""",
    "lm-eval": """@misc{eval-harness,
  title  = {The Language Model Evaluation Harness},
  author = {Gao, Leo and Tow, Jonathan and Abbasi, Baber and Biderman, Stella and others},
  year   = {2024},
  doi    = {10.5281/zenodo.12608602},
  url    = {https://github.com/EleutherAI/lm-evaluation-harness}
}""",
}
_CRITERIA = {
    "obs": ("obs", "ziplm"), "wanda": ("wanda",), "wifv": ("flap",), "activation": ("minitron",),
    "taylor": ("llm-pruner",), "l1": ("magnitude",), "l2": ("magnitude",),
}  # fmt: skip

_DEPTH_CRITERIA = {
    "angular": "angular", "block_influence": "block_influence", "perplexity": "shortened-llm",
    "taylor": "shortened-llm", "magnitude": "shortened-llm", "greedy": "sleb", "exchange": "sleb",
}  # fmt: skip
_HIDDEN_CRITERIA = {
    "activation": "minitron", "taylor": "llm-pruner", "magnitude": "llm-pruner", "pca": "slicegpt",
}  # fmt: skip


def citations(config: PruningConfig, tasks: bool = False, ratio: float | None = None) -> list[str]:
    """BibTeX entries of what a configuration uses.

    Args:
        config: The configuration.
        tasks: Whether tasks of lm-eval were measured.
        ratio: The ratio that was asked for.
    """
    names = [*_CRITERIA.get(config.criterion, ())] if config.kinds(WIDTH_UNITS) else []
    names += [_DEPTH_CRITERIA[config.depth_criterion]] if config.chooses_depth(ratio) else []
    names += [_HIDDEN_CRITERIA[config.hidden_criterion]] if "hidden" in config.units else []
    names += ["flap"] if config.allocation == "global" else []
    names += ["obs"] if config.compensation else []
    names += ["lm-eval"] if tasks else []
    return [_PAPERS[name] for name in dict.fromkeys(names)]
