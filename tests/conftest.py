"""Shared by all tests: a quiet and offline environment, small tokenizers and models, and the real pair."""

import copy
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

# Before torch and the hub are imported. Threads that wait for a busy core are slower than one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    DO_NOT_TRACK="1",
    WANDB_MODE="disabled",
    TRL_EXPERIMENTAL_SILENCE="1",
)

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from tests.serving import HIDDEN_STATES, FaultyProxy, VLLMProcess

# Shells make background processes ignore the first two, and nohup the third; what tests start would inherit that.
for _number, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGQUIT, signal.SIG_DFL),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

ROOT = Path(__file__).parents[1]

CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "hello there, how are you today? I am fine, thank you.",
    "system\nuser\nassistant\ntool\n\n\nYou are helpful.\n\n\n\nsystem\n\n\n",
    "one two three four five six seven eight nine ten",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "phi": (PhiConfig, PhiForCausalLM, {}),  # has a bias in its head
    "cohere": (Cohere2Config, Cohere2ForCausalLM, {"logit_scale": 0.25}),
    "granite": (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 4.0}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"n_positions": 64}),
    "rwkv": (RwkvConfig, RwkvForCausalLM, {"attention_hidden_size": 32}),
    "recurrent_gemma": (
        RecurrentGemmaConfig,
        RecurrentGemmaForCausalLM,
        {"head_dim": 8, "attention_window_size": 16, "tie_word_embeddings": False},
    ),
    "mamba": (MambaConfig, MambaForCausalLM, {"state_size": 8, "tie_word_embeddings": False}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 4}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 8},
    ),
    "minimax": (
        MiniMaxConfig,
        MiniMaxForCausalLM,
        {
            "head_dim": 8,
            "block_size": 4,
            "num_local_experts": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}


_VLLM_FILES = {"test_vllm_colocate.py", "test_vllm_nccl.py", "test_vllm_own_servers.py", "test_vllm.py"}


# The slowest, in this order.
_FIRST_FILES = (
    "test_distributed.py",
    "test_vllm.py",
    "test_examples.py",
    "test_gpu_stages.py",
    "test_resume.py",
    "test_smollm2.py",
    "test_vllm_answers.py",
    "test_deepspeed.py",
    "test_student_teachers.py",
    "test_triton.py",
    "test_triton_topk.py",
)


def pytest_collection_modifyitems(items):
    """Mark what needs vLLM: the tests of its engines, and those that take its server. Begin with the slowest files.

    If one of them came last, the other processes would have nothing to do.
    """
    order = {name: index for index, name in enumerate(_FIRST_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    for item in items:
        takes_server = {"vllm_server", "hidden_server"} & {*getattr(item, "fixturenames", ())}
        if takes_server or item.path.name in _VLLM_FILES:
            item.add_marker(pytest.mark.vllm)


@pytest.fixture(scope="session")
def byte_level_backend():
    """A byte-level BPE tokenizer, like that of SmolLM2 or Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def byte_level(byte_level_backend):
    """Make a byte-level tokenizer with a chat template, pad == eos == <|im_end|>, and optionally a bos."""

    def make(chat_template=CHATML, *, has_bos=False):
        backend = copy.deepcopy(byte_level_backend)
        if has_bos:
            backend.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            bos_token="<s>",
            eos_token="<|im_end|>",
            pad_token="<|im_end|>",
            extra_special_tokens=["<|im_start|>", "<|endoftext|>"],
            chat_template=chat_template,
        )

    return make


@pytest.fixture(scope="session")
def chat_tokenizer():
    """Make a byte-level tokenizer with the special tokens and the template of a chat of tests/data/templates.py."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS * 4, trainer)

    def make(chat):
        return PreTrainedTokenizerFast(
            tokenizer_object=copy.deepcopy(backend),
            bos_token=chat.bos,
            eos_token=chat.eos,
            pad_token=chat.eos,
            extra_special_tokens=list(chat.special),
            chat_template=chat.template,
        )

    return make


@pytest.fixture(scope="session")
def tiny_model():
    """Make a causal LM with random weights, on the CPU in float32.

    Its families: llama, qwen2, gemma2 (soft-cap), phi (head with bias), cohere (logit scale), granite (logits scaling),
    gpt2 (learned positions), rwkv and recurrent_gemma (read padding), minimax (does once it decodes), mamba (does not),
    mixtral and qwen3_moe (mixtures of experts).
    The default vocabulary fits the byte_level tokenizer. `head_scale` enlarges the head, so that distributions differ.
    """

    def make(family="llama", *, hidden=32, layers=2, vocab=368, seed=0, head_scale=20.0, eos=2, **config):
        config_class, model_class, extra = _FAMILIES[family]
        set_seed(seed)
        model = model_class(
            config_class(
                vocab_size=vocab,
                hidden_size=hidden,
                intermediate_size=2 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                bos_token_id=3,
                eos_token_id=eos,
                **{"pad_token_id": eos if isinstance(eos, int) else eos[0], **extra, **config},
            )
        )
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(head_scale)
        return model.eval()

    return make


@pytest.fixture
def flash_like(monkeypatch):
    """The name of an attention that, like FlashAttention, takes only halves."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module, query, key, value, *args, **kwargs):
        if torch.is_autocast_enabled(query.device.type):  # rotary embeddings may have made these float32
            dtype = torch.get_autocast_dtype(query.device.type)
            query, key, value = (states.to(dtype) for states in (query, key, value))
        if query.dtype == torch.float32:
            raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    name = "only_halves"  # a name with "flash" would have transformers look for the library
    monkeypatch.setattr("gkd_trainer.models.heads._TAKES_HALVES", name)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, attend)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name, sdpa_mask)
    return name


@pytest.fixture(scope="session")
def tiny_encoder_decoder():
    """Make an encoder-decoder with random weights, on the CPU in float32.

    Its families: t5 (tied, so that the head's input is scaled), t5_untied, mt5 (gated), bart (a bias behind the head
    that is not zero, learned positions, starts with its eos). The stop token is 2, T5's start and pad token 0.
    """

    def make(family="t5", *, hidden=32, layers=2, vocab=368, seed=0, **config):
        set_seed(seed)
        if family == "bart":
            sizes = {
                f"{side}_{name}": size
                for side in ("encoder", "decoder")
                for name, size in (("layers", layers), ("attention_heads", 4), ("ffn_dim", 2 * hidden))
            }
            ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
            options = {"d_model": hidden, "max_position_embeddings": 128, **sizes, **ids}
            model = BartForConditionalGeneration(BartConfig(vocab_size=vocab, **{**options, **config}))
            model.final_logits_bias.normal_()
        else:
            options = {
                "d_kv": 8,
                "d_model": hidden,
                "d_ff": 2 * hidden,
                "num_layers": layers,
                "num_heads": 4,
                "pad_token_id": 0,
                "eos_token_id": 2,
                "decoder_start_token_id": 0,
            }
            if family == "t5_untied":
                options |= {"tie_word_embeddings": False}
            classes = (
                (MT5Config, MT5ForConditionalGeneration) if family == "mt5" else (T5Config, T5ForConditionalGeneration)
            )
            model = classes[1](classes[0](vocab_size=vocab, **{**options, **config}))
        with torch.no_grad():
            # So that distributions differ, but no token is certain.
            model.lm_head.weight.mul_({"t5": 1.0, "bart": 10.0}.get(family, 0.3))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def smollm2_pair():
    """The folders of SmolLM2-135M-Instruct and of the student cut out of it: (teacher, student)."""
    pair = Path(os.environ.get("GKD_SMOLLM2_DIR", ROOT / ".cache" / "smollm2"))
    if not (pair / "student" / "config.json").exists():
        subprocess.run([sys.executable, str(ROOT / "examples" / "smollm2.py"), "--output", str(pair)], check=True)
    return pair / "teacher", pair / "student"


@pytest.fixture(scope="session")
def smollm2_dir(smollm2_pair):
    """The folder of SmolLM2-135M-Instruct."""
    return smollm2_pair[0]


@pytest.fixture(scope="session")
def smollm2_student_dir(smollm2_pair):
    """The folder of the student cut out of SmolLM2-135M-Instruct."""
    return smollm2_pair[1]


@pytest.fixture(scope="session")
def served_model(tiny_model):
    """The model behind `vllm_server`; vLLM's CPU kernels want heads of 32 or wider."""
    return tiny_model(hidden=128)


@pytest.fixture(scope="session")
def served_dir(served_model, byte_level, tmp_path_factory):
    """The folder of `served_model` and of the tokenizer that `byte_level` makes by default."""
    folder = tmp_path_factory.mktemp("served")
    served_model.save_pretrained(folder)
    byte_level().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vllm_server(served_dir, tmp_path_factory):
    """A vLLM server of `served_dir` in float32, one for the whole run; who kills it starts it again."""
    server = VLLMProcess(served_dir, tmp_path_factory.mktemp("vllm") / "server.log")
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def hidden_server(served_dir, tmp_path_factory):
    """A vLLM server that returns the hidden states of `served_dir` in float32, one for the whole run."""
    server = VLLMProcess(served_dir, tmp_path_factory.mktemp("vllm-hidden") / "server.log", *HIDDEN_STATES)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def hidden_proxy(hidden_server):
    """A proxy before `hidden_server` that can be told to answer wrongly."""
    with FaultyProxy(hidden_server.base_url) as proxy:
        yield proxy


@pytest.fixture
def proxy(vllm_server):
    """A proxy before `vllm_server` that can be told to answer wrongly."""
    with FaultyProxy(vllm_server.base_url) as proxy:
        yield proxy


@pytest.fixture
def shown(monkeypatch):
    """A captured notebook: `states`, the last HTML of each display, and transformers' `callback` for it."""
    states = []

    class Display:
        def __init__(self, html):
            self.place = len(states)
            states.append(html)

        def update(self, html):
            states[self.place] = html

    display = SimpleNamespace(HTML=str, display=lambda html, display_id=None: Display(html))
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.delitem(sys.modules, "transformers.utils.notebook", raising=False)
    notebook = importlib.import_module("transformers.utils.notebook")
    yield SimpleNamespace(states=states, callback=notebook.NotebookProgressCallback)
    sys.modules.pop("transformers.utils.notebook", None)


@pytest.fixture
def short_waits(monkeypatch):
    """Have the client of servers wait hardly at all before it tries again."""
    from gkd_trainer import vllm_client

    for name, seconds in (("_FIRST_WAIT", 0.01), ("_LONGEST_WAIT", 0.1), ("_JITTER", 0.01)):
        monkeypatch.setattr(vllm_client, name, seconds)


@pytest.fixture
def config_of(tmp_path):
    """Make a configuration that writes to a temporary folder and reports to nobody."""
    from gkd_trainer import GKDConfig

    def make(config_class=GKDConfig, **options):
        return config_class(**{"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, **options})

    return make
