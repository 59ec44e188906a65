"""Laws that every cipher in conf/cipher must hold, and what pixel shuffling does by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from torch.nn.functional import conv2d

from fl.ciphers.pixel_shuffle import pixel_shuffle
from fl.config import CONF, build
from fl.keys import SharedKey
from fl.learn import normalise

EVERY = sorted(p.stem for p in (CONF / "cipher").glob("*.yaml"))
OTHER = SharedKey(bytes(range(1, 33)))


def make(name: str, key: SharedKey, block: int):
    return build(OmegaConf.to_container(OmegaConf.load(CONF / "cipher" / f"{name}.yaml")), key=key, block=block)


def images(n: int = 2, h: int = 32, w: int = 48) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, h, w), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def blocks(x: torch.Tensor, p: int) -> np.ndarray:
    """(n, h/p, w/p, 3*p*p): each block's values channel by channel, row by row."""
    n, c, h, w = x.shape
    return x.numpy().reshape(n, c, h // p, p, w // p, p).transpose(0, 2, 4, 1, 3, 5).reshape(n, h // p, w // p, c * p * p)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_there_are_ciphers_to_hold_to_the_laws():
    assert {"pixel_shuffle", "plain"} <= set(EVERY)


@pytest.mark.parametrize("block", [2, 8, 16])
@pytest.mark.parametrize("name", EVERY)
def test_decrypt_inverts_encrypt_bit_for_bit(name, block, key):
    cipher, x = make(name, key, block), images()
    before = x.clone()
    y = cipher.encrypt(x)
    assert y.dtype == torch.uint8 and y.shape == x.shape
    assert torch.equal(cipher.decrypt(y), x) and torch.equal(cipher.encrypt(cipher.decrypt(x)), x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("block", [8, 16])
@pytest.mark.parametrize("name", EVERY)
def test_a_patch_embedding_can_absorb_the_cipher(name, block, key):
    cipher, x = make(name, key, block), images()
    if cipher.absorb is None:
        assert cipher.release is None
        return
    weight = torch.randn(24, 3, block, block, generator=torch.Generator().manual_seed(4))
    absorbed = cipher.absorb(weight)
    got = conv2d(normalise(cipher.encrypt(x)), absorbed, stride=block)
    assert relative_error(got, conv2d(normalise(x), weight, stride=block)) < 1e-5
    assert absorbed.shape == weight.shape and torch.equal(cipher.release(absorbed), weight)
    assert torch.equal(cipher.absorb(cipher.release(weight)), weight)


def test_the_patch_embedding_of_the_real_vit_tiny_absorbs_the_cipher(shared, key):
    files = sorted((shared / "weights").glob("vit_tiny*.safetensors"))
    if not files:
        pytest.skip(f"no ViT-Tiny weights in {shared / 'weights'}")
    with safe_open(files[0], "pt") as file:
        weight = file.get_tensor("patch_embed.proj.weight")
    cipher, x = pixel_shuffle(key, weight.shape[-1]), images(2, 224, 224)
    plain = conv2d(normalise(x), weight, stride=weight.shape[-1])
    encrypted = normalise(cipher.encrypt(x))
    assert relative_error(conv2d(encrypted, cipher.absorb(weight), stride=weight.shape[-1]), plain) < 1e-5
    assert relative_error(conv2d(encrypted, weight, stride=weight.shape[-1]), plain) > 0.5  # and only that one reads it


@pytest.mark.parametrize("name", [n for n in EVERY if n != "plain"])
def test_a_wrong_key_does_not_decrypt(name, key):
    x = images()
    guess = make(name, OTHER, 8).decrypt(make(name, key, 8).encrypt(x))
    assert (guess != x).float().mean() > 0.9


@pytest.mark.parametrize("name", [n for n in EVERY if n != "plain"])
def test_encryption_changes_what_is_seen(name, key):
    assert (make(name, key, 8).encrypt(images()) != images()).float().mean() > 0.9


def test_pixel_shuffle_permutes_each_block_by_the_one_keyed_order(key):
    x = images()
    plain, encrypted = blocks(x, 8), blocks(pixel_shuffle(key, 8).encrypt(x), 8)
    order = key.permutation("image pixel_shuffle", 3 * 8 * 8).numpy()
    for image in range(2):
        for row in range(4):
            for column in range(6):
                assert (encrypted[image, row, column] == plain[image, row, column][order]).all()


def test_pixel_shuffle_keeps_a_change_inside_its_block(key):
    x = images()
    touched = x.clone()
    touched[1, 2, 13, 30] ^= 255  # row 1, column 3 of the blocks
    cipher = pixel_shuffle(key, 8)
    differs = (blocks(cipher.encrypt(x), 8) != blocks(cipher.encrypt(touched), 8)).sum(-1)
    assert differs[1, 1, 3] == 1 and differs.sum() == 1


def test_two_blocks_by_hand():
    class Turn:
        def permutation(self, purpose, n):
            return (torch.arange(n) + 1) % n

    x = torch.tensor([[[[0, 1, 50, 51], [2, 3, 52, 53]], [[4, 5, 54, 55], [6, 7, 56, 57]], [[8, 9, 58, 59], [10, 11, 60, 61]]]])
    y = torch.tensor([[[[1, 2, 51, 52], [3, 4, 53, 54]], [[5, 6, 55, 56], [7, 8, 57, 58]], [[9, 10, 59, 60], [11, 0, 61, 50]]]])
    assert torch.equal(pixel_shuffle(Turn(), 2).encrypt(x.to(torch.uint8)), y.to(torch.uint8))


def test_what_pixel_shuffle_makes_is_pinned_for_ever(key):
    encrypted = pixel_shuffle(key, 2).encrypt(torch.arange(12, dtype=torch.uint8).view(1, 3, 2, 2))
    assert encrypted.flatten().tolist() == [2, 3, 5, 1, 4, 7, 11, 0, 10, 8, 9, 6]


@pytest.mark.parametrize("shape", [(2, 3, 12, 16), (2, 3, 16, 12), (2, 1, 16, 16), (3, 16, 16)])
def test_images_that_do_not_fit_are_refused_with_both_sizes(shape, key):
    cipher = pixel_shuffle(key, 8)
    for step in (cipher.encrypt, cipher.decrypt):
        with pytest.raises(ValueError, match="multiples of 8") as caught:
            step(torch.zeros(shape, dtype=torch.uint8))
        assert str(shape) in str(caught.value)
