"""Configuration keys of `clipdense.data`."""

from detectron2.config import CfgNode as CN


def add_data_config(cfg: CN) -> None:
    """Add the keys of `clipdense.data` (in place)."""
    # Mapper from dataset dicts to model inputs: a name in MAPPER_REGISTRY.
    cfg.INPUT.MAPPER = "DetectionMapper"
    # Replace a sample whose image, caption or mask is damaged or missing by another one in training, with a
    # warning, instead of stopping. Evaluation always stops: a score must cover all images.
    cfg.INPUT.SKIP_BAD_IMAGES = False
    # EXIF orientation of photographs: "apply" (as viewers show them), "ignore" (as stored), or "auto": ignore
    # it if only the stored pixels have the height and width that the dataset states, else apply it.
    cfg.INPUT.EXIF_ORIENTATION = "auto"
    # Largest image in pixels (height times width); a larger one is refused before it is decoded. 2^28 pixels
    # need 1 GiB.
    cfg.INPUT.MAX_PIXELS = 2**28
    # Split class names at commas into synonyms ("road, route" is one class with two names, as in ZegFormer);
    # False keeps each string whole (OVSeg, zsseg). Used by open-vocabulary models only.
    cfg.DATASETS.SPLIT_NAMES = True
    # Longer lists of names for the classes of COCO panoptic, ADE20K, Cityscapes, Mapillary Vistas,
    # PASCAL-Context and Pascal VOC, in training and evaluation; other datasets keep their own names. Used by
    # open-vocabulary models only; for those that score a class by its best name (FC-CLIP).
    cfg.DATASETS.SYNONYMS = False
    # Your own data in COCO's format: a list of "name:annotations.json:image_folder". "~" and environment
    # variables are expanded. Use the names in DATASETS.TRAIN and DATASETS.TEST.
    cfg.DATASETS.COCO_JSON = []
    # Your own label maps: a list of "name:image_folder:label_folder:classes.txt", and any of the options
    # ":ignored_value" (default 255), ":zero_unlabelled" (classes are numbered from 1), ":unknown_ignored"
    # (colours that are no class's are left out) and ":list.txt" (names of the images to use). Label maps have
    # one channel or a palette, and the names of the images; the file has one class name a line, in the order
    # of the values (or is a JSON list). If its lines have a colour ("R G B name", "name,R,G,B", CVAT's
    # labelmap.txt), label maps are pictures in these colours; the ignored value is then the name of a class.
    cfg.DATASETS.LABEL_MAPS = []
    # Your own COCO panoptic annotations: a list of "name:panoptic.json:png_folder:image_folder", or the same
    # and ":semantic" (label maps of all classes) or ":instances" (things with masks).
    cfg.DATASETS.COCO_PANOPTIC = []
    # Your own YOLO boxes or polygons: a list of "name:data.yaml:train" (or another part of the file), or
    # "name:image_folder:label_folder:classes.txt".
    cfg.DATASETS.YOLO = []
    # Your own data in Pascal VOC's layout: a list of "name:folder:split", or the same and ":boxes" (XML
    # files, default), ":masks" (objects of SegmentationObject) or ":semantic" (SegmentationClass). The split
    # is a list in ImageSets; "all" for every image.
    cfg.DATASETS.VOC = []
    # Images without annotations: a list of "name:folder", "name:images.json:image_folder" (COCO's list of
    # images), "name:list.txt:image_folder" (a name a line, of any length; or .jsonl with file_name) or
    # "name:shards/{000..331}.tar" (webdataset; also "name:s3://bucket/part-*.tar", gs:// and http://). "~"
    # and environment variables are expanded.
    cfg.DATASETS.IMAGES = []
    # Images with captions: a list of "name:captions.json:image_folder" (COCO's captions),
    # "name:captions.jsonl" (file_name and a list of captions in each line, of any length), "name:folder" or
    # "name:shards/{000..331}.tar" (webdataset, here or remote as in IMAGES); in the last two, each image has
    # a text file of the same name with one caption a line. "~" and environment variables are expanded.
    cfg.DATASETS.CAPTIONS = []
    # Mask-category pairs: a list of "name:pairs.jsonl" (images beside it), "name:pairs.parquet:image_folder",
    # "name:shards/{000..331}.tar" (webdataset; each image has a .json file of the same name with a list of
    # pairs), or "name:dataset": the annotated segments of a registered dataset with their class names.
    # Several names in DATASETS.TRAIN are mixed, uniformly over all pairs.
    cfg.DATASETS.MASK_PAIRS = []
    # Objects of a registered dataset as images of one class each, for classification: a list of
    # "name:dataset" (all objects), "name:dataset:shots" (that many of each class) or
    # "name:dataset:shots:seed".
    cfg.DATASETS.OBJECT_CROPS = []
    # Shards, and lists of any length: number of shards (or blocks of 65,536 lines) whose samples are shuffled
    # together, 1 or more. The order of the shards is shuffled as a whole.
    cfg.DATALOADER.SHUFFLE_SHARDS = 16
    # CaptionMapper (images with captions): side of the training images in pixels.
    cfg.INPUT.CAPTION = CN()
    cfg.INPUT.CAPTION.SIZE = 224
    # Range of the area of a random crop, as a share of the image.
    cfg.INPUT.CAPTION.CROP_SCALE = (0.5, 1.0)
    # Share of the captions, 0 to 1, that are replaced by a prompt about one of their nouns (needs spaCy), and
    # the templates of these prompts.
    cfg.INPUT.CAPTION.NOUN_SHARE = 0.0
    cfg.INPUT.CAPTION.NOUN_TEMPLATES = "sub_imagenet_7"
    # ObjectCropMapper: side of the images in pixels.
    cfg.INPUT.OBJECT_CROP = CN()
    cfg.INPUT.OBJECT_CROP.SIZE = 224
    # Side of the square around an object, relative to the longer side of its box.
    cfg.INPUT.OBJECT_CROP.CONTEXT = 1.2
    # Training: range of the area of the random part of the square that is resized. CoOp: (0.08, 1).
    cfg.INPUT.OBJECT_CROP.SCALE = (0.5, 1.0)
    # Large-scale jitter (Ghiasi et al., CVPR 2021) instead of MIN_SIZE_TRAIN. The longer side is resized to
    # SIZE (pixels) times a random factor from RANGE; a random square of SIZE is cut from larger images.
    cfg.INPUT.SCALE_JITTER = CN()
    cfg.INPUT.SCALE_JITTER.ENABLED = False
    cfg.INPUT.SCALE_JITTER.SIZE = 1024
    cfg.INPUT.SCALE_JITTER.RANGE = (0.1, 2.0)
