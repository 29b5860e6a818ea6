"""The training recipes of timm's published weights, and how their images are prepared."""

# By training recipe: side, crop fraction, interpolation, and the networks, all on ImageNet-1k. The
# settings are for evaluation (timm 1.0.31's test settings, which may differ from training's).
RECIPES: tuple[tuple[str, int, float, str, str], ...] = (
    (
        "tv_in1k",
        *(224, 0.875, "bilinear"),
        "resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d "
        "resnext101_64x4d wide_resnet50_2 wide_resnet101_2",
    ),
    (
        "tv2_in1k",
        *(224, 0.965, "bilinear"),
        "resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d wide_resnet50_2 "
        "wide_resnet101_2",
    ),
    (
        "a1_in1k",
        *(288, 1.0, "bicubic"),
        "resnet18 resnet34 resnet50 resnet101 resnet152 resnet50d resnext50_32x4d seresnet50",
    ),
    (
        "a2_in1k",
        *(288, 1.0, "bicubic"),
        "resnet18 resnet34 resnet50 resnet101 resnet152 resnet50d resnext50_32x4d seresnet50",
    ),
    (
        "a3_in1k",
        *(224, 0.95, "bicubic"),
        "resnet18 resnet34 resnet50 resnet101 resnet152 resnet50d resnext50_32x4d seresnet50",
    ),
    (
        "a1h_in1k",
        *(288, 1.0, "bicubic"),
        "resnet101 resnet152 resnext50_32x4d resnetv2_50 resnetv2_101",
    ),
    ("a1h_in1k", *(224, 1.0, "bicubic"), "resnet50"),
    ("b1k_in1k", *(288, 1.0, "bicubic"), "resnet50"),
    ("b2k_in1k", *(288, 1.0, "bicubic"), "resnet50"),
    ("c1_in1k", *(288, 1.0, "bicubic"), "resnet50 resnext101_64x4d"),
    ("c2_in1k", *(288, 1.0, "bicubic"), "resnet50"),
    ("d_in1k", *(288, 1.0, "bicubic"), "resnet50"),
    ("am_in1k", *(224, 0.875, "bicubic"), "resnet50"),
    ("a1h_in1k", *(288, 0.95, "bicubic"), "resnet50_gn"),
    (
        "ah_in1k",
        *(288, 1.0, "bicubic"),
        "seresnext101_32x8d seresnext101d_32x8d resnetv2_50d_gn",
    ),
    (
        "bt_in1k",
        *(288, 0.95, "bicubic"),
        "resnet26 resnet26d resnet34 resnet50 resnext50d_32x4d seresnext26d_32x4d",
    ),
    ("ra_in1k", *(288, 0.95, "bicubic"), "resnet50 resnext50_32x4d"),
    ("ram_in1k", *(288, 0.95, "bicubic"), "resnet50"),
    ("racm_in1k", *(288, 0.95, "bicubic"), "seresnext50_32x4d wide_resnet50_2"),
    ("ra2_in1k", *(288, 0.95, "bicubic"), "resnet18d resnet34d resnet50d seresnet50"),
    ("ra2_in1k", *(320, 1.0, "bicubic"), "resnet101d resnet152d resnet200d seresnet152d"),
    (
        "ra4_e3600_r224_in1k",
        *(288, 1.0, "bicubic"),
        "resnet18d resnet34 resnet50d resnetv2_18 resnetv2_18d resnetv2_34 resnetv2_34d",
    ),
    ("ra4_e3600_r384_in1k", *(448, 1.0, "bicubic"), "resnetv2_34d"),
    (
        "gluon_in1k",
        *(224, 0.875, "bicubic"),
        "resnet18 resnet34 resnet50 resnet101 resnet152 resnet50d resnet101d resnet152d "
        "resnet50c resnet101c resnet152c resnet50s resnet101s resnet152s "
        "resnext50_32x4d resnext101_32x4d resnext101_64x4d "
        "seresnext50_32x4d seresnext101_32x4d seresnext101_64x4d",
    ),
    (
        "fb_ssl_yfcc100m_ft_in1k",
        *(224, 0.875, "bilinear"),
        "resnet18 resnet50 resnext50_32x4d resnext101_32x4d resnext101_32x8d resnext101_32x16d",
    ),
    (
        "fb_swsl_ig1b_ft_in1k",
        *(224, 0.875, "bilinear"),
        "resnet18 resnet50 resnext50_32x4d resnext101_32x4d resnext101_32x8d resnext101_32x16d",
    ),
    (
        "fb_wsl_ig1b_ft_in1k",
        *(224, 0.875, "bilinear"),
        "resnext101_32x8d resnext101_32x16d resnext101_32x32d",
    ),
)

# Networks and recipes with pixels in [-1, 1].
HALVED = (
    *("ra4_e3600_r224_in1k", "ra4_e3600_r384_in1k"),
    *("resnetv2_50.a1h_in1k", "resnetv2_101.a1h_in1k", "resnetv2_50d_gn.ah_in1k"),
)
