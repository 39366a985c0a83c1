"""Photographs that ship with scikit-image, with label maps: background, inside, outline."""

from typing import Any

import numpy as np


def label_maps() -> list[tuple[np.ndarray, np.ndarray, Any]]:
    """Photographs with their label maps, and (rows, columns) of three regions in each of them."""
    from scipy import ndimage
    from skimage import data, filters, segmentation

    coins, cell, horse = data.coins() / 255, data.cell()[::4, ::4] / 255, ~data.horse()[::3, ::3]
    markers = np.where(coins > 0.6, 2, np.where(coins < 0.12, 1, 0))
    coin = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(coins), markers) == 2)
    coin = ndimage.binary_opening(coin, iterations=3)[::2, ::2]
    bright = ndimage.binary_opening(cell > filters.threshold_otsu(cell), iterations=2)
    cut = np.s_[: horse.shape[0], : horse.shape[1]]
    horse_image = np.where(horse, data.gravel()[cut] / 255, data.grass()[cut] / 360)
    return [
        (coins[::2, ::2], outlined(coin), (np.s_[:80, :], np.s_[80:116, :], np.s_[116:, :])),
        (cell, outlined(bright), (np.s_[:, :105], np.s_[:94, 105:], np.s_[94:, 105:])),
        (horse_image, outlined(horse), (np.s_[:, :85], np.s_[:55, 85:], np.s_[55:, 85:])),
    ]


def outlined(mask: np.ndarray) -> np.ndarray:
    """0 outside, 1 inside, 2 for the pixels of an object that touch the outside."""
    from scipy import ndimage

    return mask.astype(np.int32) + (mask & np.logical_not(ndimage.binary_erosion(mask)))
