"""The average of an adapter: of the products B·A, exact until it is cut, and then within its bound."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

from gkd_trainer.errors import GKDTeacherError
from gkd_trainer.teachers.average import HELD_RANKS, AdapterAverage, Factors, Matrix, new_product, product_of

LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}


def drift(steps, outputs, inputs, rank, speed=0.1):
    """B and A of an adapter that moves, in float64."""
    numbers = torch.Generator().manual_seed(0)
    options = {"generator": numbers, "dtype": torch.float64}
    b_Or, a_rI = torch.randn(outputs, rank, **options), torch.randn(rank, inputs, **options)
    for _ in range(steps):
        yield b_Or, a_rI
        b_Or = b_Or + speed * torch.randn(outputs, rank, **options)
        a_rI = a_rI + speed * torch.randn(rank, inputs, **options)


def averaged(pairs, decay):
    """The product of an average in float32, and the same matrix from a sum in float64."""
    product, expected_OI = None, None
    for b_Or, a_rI in pairs:
        if product is None:
            product, expected_OI = new_product(b_Or.float(), a_rI.float()).averaged(b_Or, a_rI, 0.0), b_Or @ a_rI
        else:
            product = product.averaged(b_Or, a_rI, decay)
            expected_OI = decay * expected_OI + (1 - decay) * (b_Or @ a_rI)
    return product, expected_OI


def error(product, expected_OI):
    return float((product.matrix() - expected_OI).norm() / expected_OI.norm())


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(("outputs", "inputs", "kind"), [(97, 81, Factors), (31, 17, Matrix)])
def test_an_average_is_exact_until_it_is_cut(outputs, inputs, kind, decay):
    product, expected_OI = averaged(drift(HELD_RANKS, outputs, inputs, rank=2), decay)
    assert type(product) is kind
    assert product.relative_error == 0.0
    assert error(product, expected_OI) < 1e-6


@pytest.mark.parametrize("speed", [0.01, 0.3])
@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_cuts_stay_within_their_bound(speed, decay):
    product, expected_OI = averaged(drift(60, 97, 81, rank=2, speed=speed), decay)
    assert len(product.right_RI) <= HELD_RANKS * 2
    assert 1e-6 < error(product, expected_OI) <= product.relative_error + 1e-5
    assert product.relative_error < 5 * error(product, expected_OI)


def test_a_matrix_is_never_cut():
    product, expected_OI = averaged(drift(60, 31, 17, rank=2), 0.99)
    assert product.relative_error == 0.0
    assert error(product, expected_OI) < 1e-6


def test_the_average_of_products_is_not_the_product_of_averages():
    pairs = list(drift(20, 31, 17, rank=2, speed=0.3))
    product, _ = averaged(pairs, 0.9)
    b_Or, a_rI = pairs[0]
    for b, a in pairs[1:]:
        b_Or, a_rI = 0.9 * b_Or + 0.1 * b, 0.9 * a_rI + 0.1 * a
    assert error(product, b_Or @ a_rI) > 0.05


@pytest.mark.parametrize(("outputs", "inputs"), [(97, 81), (31, 17)])
def test_inputs_are_multiplied_by_the_transposed_matrix(outputs, inputs):
    product, _ = averaged(drift(40, outputs, inputs, rank=2), 0.9)
    x_BLI = torch.randn(3, 5, inputs, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(product.applied_to(x_BLI), x_BLI @ product.matrix().T, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("outputs", "inputs"), [(97, 81), (31, 17)])
def test_a_state_gives_the_product_back_to_the_bit(outputs, inputs):
    product, _ = averaged(drift(40, outputs, inputs, rank=2), 0.9)
    again = product_of(product.state())
    assert torch.equal(again.matrix(), product.matrix())
    assert again.relative_error == product.relative_error


def test_half_precision_adapters_are_averaged_in_float32():
    pairs = [(b.bfloat16(), a.bfloat16()) for b, a in drift(10, 97, 81, rank=2)]
    product = new_product(*pairs[0])
    for pair in pairs:
        product = product.averaged(*pair, 0.99)
    assert product.matrix().dtype == torch.float32


def test_an_adapters_average_includes_its_scaling(tiny_model):
    student = get_peft_model(tiny_model(), LoraConfig(**LORA))
    average = AdapterAverage(student, 0.5)
    average.start()
    matrices = average.matrices()
    layers = {name: layer for name, layer in student.named_modules() if hasattr(layer, "get_delta_weight")}
    assert matrices.keys() == layers.keys()
    assert len(layers) == 4
    for name, layer in layers.items():
        torch.testing.assert_close(matrices[name], layer.get_delta_weight("default"))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (LoraConfig(**{**LORA, "use_dora": True}), "q_proj is adapted in another way"),
        (LoraConfig(**{**LORA, "target_modules": ["embed_tokens"]}), "embed_tokens is adapted in another way"),
        (LoraConfig(**{**LORA, "lora_bias": True, "target_modules": ["fc1"]}), "fc1 is adapted in another way"),
        (LoraConfig(**LORA, modules_to_save=["lm_head"]), "lm_head is trained as a whole"),
        (
            IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
            "the student's adapter 'default' is of the kind IA3",
        ),
    ],
    ids=["DoRA", "embeddings", "bias", "modules_to_save", "IA3"],
)
def test_an_adapter_that_adds_anything_else_is_refused(tiny_model, config, problem):
    model = tiny_model("phi") if "fc1" in config.target_modules else tiny_model(tie_word_embeddings=False)
    with pytest.raises(GKDTeacherError, match=problem):
        AdapterAverage(get_peft_model(model, config), 0.5)


def test_two_active_adapters_are_refused(tiny_model):
    student = get_peft_model(tiny_model(), LoraConfig(**LORA))
    student.add_adapter("other", LoraConfig(**LORA))
    student.base_model.set_adapter(["default", "other"])
    with pytest.raises(GKDTeacherError, match="2 adapters are active"):
        AdapterAverage(student, 0.5)


def test_a_state_of_other_layers_is_refused(tiny_model):
    one, other = (
        AdapterAverage(get_peft_model(tiny_model(), LoraConfig(**{**LORA, "target_modules": names})), 0.5)
        for names in (["q_proj"], ["q_proj", "v_proj"])
    )
    one.start()
    with pytest.raises(GKDTeacherError, match=r"averages of 2 layers, but the student's adapter is on 4, and .*v_proj"):
        other.load_state(one.state())
