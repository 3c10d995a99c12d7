"""An evaluation is the mean over all its images, whatever the batches; its protocol names all that it depends on."""

import gc
import json
import math
import tracemalloc

import lpips
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch_fidelity.metric_isc import isc_features_to_metric
from torchvision import models

from tests.inception import Colours, Differences
from vqhit import HiTGenerator
from vqhit.comparison import Comparison
from vqhit.config import ConfigError
from vqhit.evaluate import evaluate_generator, evaluate_pictures, evaluate_tokenizer
from vqhit.extractors import InceptionExtractor, PooledExtractor
from vqhit.files import KnownFile, sha256
from vqhit.folder import DataError, FolderSource, list_images
from vqhit.images import center_crop, from_uint8, load_image, pil_to_uint8, to_uint8
from vqhit.measure import ImageSet, Reconstruction, exact_float32, take_reference, take_samples
from vqhit.metrics import psnr, ssim
from vqhit.perceptual import FeaturesConfig
from vqhit.protocol import EvaluationSettings

WITHOUT_NETWORKS = ("psnr", "ssim", "codebook")


def measured(model, folder, metrics=WITHOUT_NETWORKS, **settings):
    return evaluate_tokenizer(model, folder, EvaluationSettings(metrics=metrics, **settings))


@pytest.fixture
def twelve(tmp_path, picture):
    """Twelve small photographs, enough for an inception score."""
    folder = tmp_path / "twelve"
    folder.mkdir()
    for index in range(12):
        picture(20 + index, 24, seed=index).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture
def vgg16(tmp_path, monkeypatch):
    """A file of VGG16 features, generated, in the place of torchvision's; returns its path and its trunk."""
    torch.manual_seed(0)
    trunk = models.vgg16(weights=None).features
    torch.save(trunk.state_dict(prefix="features."), path := tmp_path / "vgg16.pth")
    monkeypatch.setattr("vqhit.perceptual.VGG16_TORCHVISION", KnownFile("vgg16.pth", "", sha256(path)))
    return path, trunk


def crops_and_reconstructions(model, folder):
    originals = torch.stack([pil_to_uint8(center_crop(load_image(folder / name), 16)) for name in list_images(folder)])
    return originals, to_uint8(model.reconstruct(from_uint8(originals)))


def fid(first, second):
    """Of few vectors, in another way: the root's trace is the nuclear norm of the product of the centred vectors."""
    means = [features.double().mean(0) for features in (first, second)]
    rows = [
        (features.double() - mean) / (len(features) - 1) ** 0.5
        for features, mean in zip((first, second), means, strict=True)
    ]
    spread = sum(each.square().sum() for each in rows) - 2 * torch.linalg.svdvals(rows[0] @ rows[1].T).sum()
    return float((means[0] - means[1]).square().sum() + spread)


def test_evaluation_is_the_mean_over_images_and_names_its_protocol(tiny_model, photo_folder):
    results = measured(tiny_model, photo_folder, batch_size=4)
    paths = [photo_folder / name for name in list_images(photo_folder)]
    crops = torch.stack([pil_to_uint8(center_crop(load_image(path), 16)) for path in paths])
    floats = tiny_model.preprocess(paths)
    tokens = tiny_model.encode(floats)
    reconstructions = torch.stack([pil_to_uint8(image) for image in tiny_model.postprocess(tiny_model.decode(tokens))])
    assert results["images"] == 6
    assert results["psnr"] == pytest.approx(psnr(crops, reconstructions).mean().item(), rel=1e-9)
    assert results["ssim"] == pytest.approx(ssim(crops, reconstructions).mean().item(), rel=1e-9)
    assert results["codes_used"] == len(tokens.unique())
    shares = torch.bincount(tokens.flatten()).double() / tokens.numel()
    entropy = -sum(p * math.log(p) for p in shares.tolist() if p > 0)
    assert results["codebook_perplexity"] == pytest.approx(math.exp(entropy))
    assert results["protocol"]["reference"]["crop"].startswith("ADM center crop")
    json.dumps(results, allow_nan=False)


def test_results_do_not_depend_on_batch_size_or_workers(tiny_model, photo_folder):
    keys = ("psnr", "ssim", "codes_used", "codebook_perplexity")
    one = measured(tiny_model, photo_folder, batch_size=1)
    other = measured(tiny_model, photo_folder, batch_size=5, workers=2)
    assert [one[key] for key in keys] == pytest.approx([other[key] for key in keys], rel=1e-6)


def test_limit_takes_images_spread_over_the_folder(tiny_model, photo_folder):
    assert measured(tiny_model, photo_folder, limit=2)["images"] == 2
    paths = [photo_folder / name for name in list_images(photo_folder)]
    first_and_fourth = tiny_model.preprocess([paths[0], paths[3]])
    expected = psnr(to_uint8(first_and_fourth), to_uint8(tiny_model.reconstruct(first_and_fourth))).mean().item()
    assert measured(tiny_model, photo_folder, limit=2)["psnr"] == pytest.approx(expected, rel=1e-6)
    assert measured(tiny_model, photo_folder, limit=100)["images"] == 6


def test_every_metric_is_its_oracles(tiny_model, twelve, inception, vgg16, tmp_path):
    path, trunk = vgg16
    given = {"inception": str(inception), "lpips": str(path), "batch_size": 5}
    results = evaluate_tokenizer(tiny_model, twelve, EvaluationSettings(**given))  # all of them
    originals, reconstructions = crops_and_reconstructions(tiny_model, twelve)
    network = InceptionExtractor(inception)
    found = [[network(part) for part in images.split(5)] for images in (originals, reconstructions)]
    of_originals, of_reconstructions = (torch.cat([part.features for part in parts]) for parts in found)
    assert results["rfid"] == pytest.approx(fid(of_originals, of_reconstructions), rel=1e-9)  # 12 images, 2048 features
    expected = isc_features_to_metric(torch.cat([part.logits for part in found[1]]))
    assert results["is"] == pytest.approx(expected["inception_score_mean"], rel=1e-12)
    assert results["is_std"] == pytest.approx(expected["inception_score_std"], rel=1e-9)
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for part in theirs.net.children():
        part.load_state_dict({k: v for k, v in trunk.state_dict().items() if k in part.state_dict()})
    distances = theirs(from_uint8(originals), from_uint8(reconstructions))
    assert results["lpips"] == pytest.approx(distances.mean().item(), rel=1e-5)
    assert results["psnr"] == pytest.approx(psnr(originals, reconstructions).mean().item(), rel=1e-9)
    assert results["left_out"] == {}
    assert results["dead_codes"] == 32 - results["codes_used"]
    protocol = results["protocol"]
    assert protocol["network"]["name"].startswith("Inception-2015-12-05")
    assert protocol["network"]["sha256"] == sha256(inception)
    assert protocol["reference"] == {
        "data": str(twelve),
        "on_hub": False,
        "split": None,
        "images": 12,
        "selection": "all",
        "image_size": 16,
        "decoding": "PIL, turned as EXIF says, transparency over white, 16-bit grey scaled to 8",
        "crop": "ADM center crop: box halving, bicubic resize of the short side",
    }
    assert protocol["remark"].startswith("12 pictures against 12 images: the fewer, the higher")
    assert protocol["versions"]["torch"] == torch.__version__
    assert 0 < results["share_in_networks"] < 1
    json.dumps(results, allow_nan=False)


def test_no_metric_depends_on_the_batches_or_the_workers(tiny_model, twelve, inception, vgg16, squeezenet):
    given = {"inception": str(inception), "lpips": str(vgg16[0])}
    network = {"features": squeezenet[0], "feature_weights": str(squeezenet[1])}
    first, second = (
        measured(tiny_model, twelve, ("is", "psnr", "ssim", "lpips", "codebook"), **given, **batches)
        | measured(tiny_model, twelve, ("rfid",), **network, **batches)
        for batches in ({"batch_size": 1}, {"batch_size": 5, "workers": 2})
    )
    for key in ("is", "is_std", "psnr", "ssim", "lpips", "codes_used", "codebook_perplexity", "dead_codes"):
        assert first[key] == pytest.approx(second[key], rel=1e-6, abs=1e-9)
    assert first["frechet_distance"] == pytest.approx(second["frechet_distance"], rel=1e-5)  # float32 convolutions


def test_a_metric_whose_network_cannot_be_had_is_left_out_or_refused_if_it_was_named(tiny_model, twelve, no_downloads):
    results = evaluate_tokenizer(tiny_model, twelve)
    assert sorted(results["left_out"]) == ["is", "lpips", "rfid"]
    assert "weights-inception-2015-12-05-6726825d.pth" in results["left_out"]["rfid"]
    assert not {"rfid", "is", "lpips"} & results.keys()
    assert results["psnr"] > 0
    with pytest.raises(ValueError, match=r"cannot download .*weights-inception-2015-12-05-6726825d"):
        measured(tiny_model, twelve, ("psnr", "rfid"))
    with pytest.raises(ValueError, match=r"no-file\.pth: no such file"):  # a file that was named is not left out
        evaluate_tokenizer(tiny_model, twelve, EvaluationSettings(inception="no-file.pth"))


def test_images_that_cannot_be_read_are_counted_and_keep_no_other_out(tiny_model, twelve, inception):
    (twelve / "03.png").write_bytes(b"no image")
    given = {"inception": str(inception), "batch_size": 4, "max_bad": 0.5}
    results = measured(tiny_model, twelve, ("is", "psnr"), **given)
    assert (results["images"], results["skipped"], len(results["skipped_images"])) == (11, 1, 1)
    assert results["protocol"]["reference"]["images"] == 11
    with pytest.raises(DataError, match="1 of 12 images cannot be read"):
        measured(tiny_model, twelve, ("psnr",))


def test_statistics_of_a_reference_set_are_saved_and_used_again(tiny_model, twelve, squeezenet, tmp_path):
    network = {"features": squeezenet[0], "feature_weights": str(squeezenet[1])}
    saved = measured(tiny_model, twelve, ("rfid",), **network, save_stats=str(tmp_path / "s.npz"))
    again = measured(tiny_model, twelve, ("rfid",), **network, stats=str(tmp_path / "s.npz"))
    assert again["frechet_distance"] == pytest.approx(saved["frechet_distance"], rel=1e-9)
    reference = again["protocol"]["reference"]
    assert reference["sha256"] == sha256(tmp_path / "s.npz")
    assert reference["made_by"]["reference"] == saved["protocol"]["reference"]
    assert again["protocol"]["remark"].startswith("12 pictures against 12 images")
    other = {**network, "features": squeezenet[0].model_copy(update={"layers": (4,)})}
    with pytest.raises(ValueError, match=r"s\.npz: statistics of 192 features; this network has 128"):
        measured(tiny_model, twelve, ("rfid",), **other, stats=str(tmp_path / "s.npz"))
    other = {**network, "features": squeezenet[0].model_copy(update={"max_value": 255.0})}
    with pytest.raises(ValueError, match=r"s\.npz: made with preprocessing .*; this evaluation has"):
        measured(tiny_model, twelve, ("rfid",), **other, stats=str(tmp_path / "s.npz"))
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(192), sigma=np.eye(192))
    foreign = measured(tiny_model, twelve, ("rfid",), **network, stats=str(tmp_path / "foreign.npz"))
    assert foreign["protocol"]["reference"]["made_by"].startswith("unknown")
    assert foreign["protocol"]["remark"].startswith("12 pictures against an unknown number of images")
    with pytest.raises(ValueError, match=r"stats: no metric that is measured compares features$"):
        measured(tiny_model, twelve, ("psnr",), stats=str(tmp_path / "s.npz"))


def test_pictures_of_anything_else_are_measured_by_the_same_protocol(
    tiny_model, twelve, inception, squeezenet, tmp_path
):
    network = {"features": squeezenet[0], "feature_weights": str(squeezenet[1])}
    expected = measured(tiny_model, twelve, ("rfid", "psnr", "ssim"), **network)
    expected |= measured(tiny_model, twelve, ("is",), inception=str(inception))
    (made := tmp_path / "made").mkdir()
    _, reconstructions = crops_and_reconstructions(tiny_model, twelve)
    for name, image in zip(list_images(twelve), tiny_model.postprocess(from_uint8(reconstructions)), strict=True):
        image.save(made / name.replace(".png", ".bmp"))
    results = evaluate_pictures(made, twelve, EvaluationSettings(metrics=("fid", "psnr", "ssim"), **network))
    results |= evaluate_pictures(made, None, EvaluationSettings(metrics=("is",), inception=str(inception)))
    for key in ("frechet_distance", "is", "psnr", "ssim"):
        assert results[key] == pytest.approx(expected[key], rel=1e-6)
    assert results["protocol"]["pictures_are"]["crop"].startswith("none")
    by_default = evaluate_pictures(made, twelve, EvaluationSettings(**network))
    assert by_default["frechet_distance"] == results["frechet_distance"]
    assert "psnr" not in by_default


def test_pictures_are_of_one_size_unless_they_are_to_be_cut(twelve, squeezenet, tmp_path, picture):
    network = {"features": squeezenet[0], "feature_weights": str(squeezenet[1])}
    settings = EvaluationSettings(metrics=("fid",), **network)
    with pytest.raises(DataError, match=r"00\.png: 20x24 px; pictures are squares"):
        evaluate_pictures(twelve, twelve, settings)
    (made := tmp_path / "made").mkdir()
    for index, size in enumerate((16, 16, 17)):
        picture(size, size, seed=index).save(made / f"{index}.png")
    with pytest.raises(DataError, match=r"2\.png: 17x17 px; the first picture is 16x16"):
        evaluate_pictures(made, twelve, settings)
    same = evaluate_pictures(twelve, twelve, settings, size=16)
    assert same["frechet_distance"] == pytest.approx(0, abs=1e-5)
    assert same["protocol"]["pictures_are"]["crop"].startswith("ADM")


def test_pairs_are_found_by_name_and_a_picture_without_original_is_named(twelve, tmp_path, picture):
    (made := tmp_path / "made").mkdir()
    picture(16, 16).save(made / "07.png")
    settings = EvaluationSettings(metrics=("psnr",))
    results = evaluate_pictures(made, twelve, settings)
    original = pil_to_uint8(center_crop(load_image(twelve / "07.png"), 16))[None]
    expected = psnr(original, pil_to_uint8(load_image(made / "07.png"))[None]).item()
    assert results["psnr"] == pytest.approx(expected, rel=1e-12)
    picture(16, 16).save(made / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png: no image of this name in"):
        evaluate_pictures(made, twelve, settings)
    picture(16, 16).save(twelve / "07.bmp")
    with pytest.raises(DataError, match=r"07\.bmp and .*07\.png: both are called 07"):
        evaluate_pictures(made, twelve, settings)


def test_an_original_that_cannot_be_read_leaves_its_pair_out_and_is_named(twelve, tmp_path, picture):
    (made := tmp_path / "made").mkdir()
    for index in range(12):
        picture(16, 16, seed=index).save(made / f"{index:02d}.png")
    settings = EvaluationSettings(metrics=("psnr",), batch_size=5, max_bad=0.2)
    whole = evaluate_pictures(made, twelve, settings)
    (made / "11.png").unlink()
    eleven = evaluate_pictures(made, twelve, settings)
    picture(16, 16, seed=11).save(made / "11.png")
    (twelve / "11.png").write_bytes(b"no image")
    results = evaluate_pictures(made, twelve, settings)
    assert results["psnr"] == pytest.approx(eleven["psnr"], rel=1e-12)
    assert results["psnr"] != pytest.approx(whole["psnr"], rel=1e-6)
    assert (results["images"], results["pairs"], results["skipped"]) == (12, 11, 1)
    assert results["skipped_images"][0].startswith(str(twelve / "11.png"))
    assert results["protocol"]["originals"]["images"] == 11
    with pytest.raises(DataError, match="1 of 12 images cannot be read"):
        evaluate_pictures(made, twelve, EvaluationSettings(metrics=("psnr",)))
    for path in twelve.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="psnr: no picture and its original that can be read"):
        evaluate_pictures(made, twelve, EvaluationSettings(metrics=("psnr",), max_bad=1.0))


def test_a_tokenizer_in_training_is_measured_in_eval_mode_and_left_as_it_was(tiny_model, twelve):
    expected = measured(tiny_model, twelve)
    tiny_model.train()
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    assert measured(tiny_model, twelve)["psnr"] == expected["psnr"]
    assert tiny_model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_model.state_dict().items())


@pytest.mark.parametrize("metrics", [("lpips",), ("rfid",), ("is",)])
def test_a_metric_without_its_network_is_refused(metrics):
    with pytest.raises(ValueError, match=f"{metrics[0]}.*needs"):
        Comparison((*metrics, "psnr"), "cpu")


def test_float32_is_exact_while_it_is_measured_and_then_as_before():
    places = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [place.fp32_precision for place in places]
    with exact_float32():
        assert [place.fp32_precision for place in places] == ["ieee", "ieee"]
    assert [place.fp32_precision for place in places] == before


def test_the_reference_may_be_cropped_as_the_papers_code_does(tiny_generator_config, twelve, squeezenet):
    torch.manual_seed(0)
    generator = HiTGenerator(tiny_generator_config).eval()
    settings = EvaluationSettings(
        samples=5, crop_proportion=0.5, features=squeezenet[0], feature_weights=str(squeezenet[1])
    )
    results = evaluate_generator(generator, twelve, settings)
    crops = []
    for name in list_images(twelve):
        image = load_image(twelve / name)
        side = min(image.size) / 2
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
        crops.append(pil_to_uint8(image.resize((16, 16), Image.Resampling.BICUBIC, box=box)))
    extractor = PooledExtractor(*squeezenet, 16)
    samples = to_uint8(generator.sample(5, seed=0))
    expected = fid(extractor(torch.stack(crops)).features, extractor(samples).features)
    assert results["frechet_distance"] == pytest.approx(expected, rel=1e-5)
    assert results["protocol"]["reference"]["crop"] == "middle square of 0.5 of the short side, bicubic"


def test_a_reference_that_is_of_no_use_is_refused(twelve, squeezenet, tmp_path):
    network = {"features": squeezenet[0], "feature_weights": str(squeezenet[1])}
    evaluate_pictures(twelve, twelve, EvaluationSettings(**network, save_stats=str(tmp_path / "s.npz")), size=16)
    settings = EvaluationSettings(**network, stats=str(tmp_path / "s.npz"))
    with pytest.raises(ValueError, match="reference: stats stand for it; leave it out"):
        evaluate_pictures(twelve, twelve, settings, size=16)


def test_samples_are_compared_with_images_or_their_statistics(
    tiny_generator_config, twelve, inception, squeezenet, tmp_path
):
    torch.manual_seed(0)
    generator = HiTGenerator(tiny_generator_config).eval()
    given = {"samples": 11, "seed": 3, "batch_size": 4}
    network = {"features": squeezenet[0], "feature_weights": str(squeezenet[1])}
    saved = EvaluationSettings(**given, **network, save_stats=str(tmp_path / "s.npz"))
    results = evaluate_generator(generator, twelve, saved)
    samples = to_uint8(generator.sample(11, seed=3))
    crops = torch.stack([pil_to_uint8(center_crop(load_image(twelve / n), 16)) for n in list_images(twelve)])
    extractor = PooledExtractor(*squeezenet, 16)
    expected = fid(extractor(crops).features, extractor(samples).features)
    assert results["frechet_distance"] == pytest.approx(expected, rel=1e-5)
    assert (results["images"], results["samples"]) == (12, 11)
    stats = EvaluationSettings(**given, **network, stats=str(tmp_path / "s.npz"))
    again = evaluate_generator(generator, None, stats)
    assert again["frechet_distance"] == pytest.approx(results["frechet_distance"], rel=1e-9)
    score = evaluate_generator(generator, None, EvaluationSettings(**given, metrics=("is",), inception=str(inception)))
    expected = isc_features_to_metric(InceptionExtractor(inception)(samples).logits)
    assert score["is"] == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    with pytest.raises(ValueError, match="data is missing: a folder of images or a data set to compare with, or stats"):
        evaluate_generator(generator, None, EvaluationSettings(**given, **network))


def test_memory_does_not_grow_with_the_number_of_images(tiny_model, tiny_generator_config, twelve):
    torch.manual_seed(0)
    generator = HiTGenerator(tiny_generator_config).eval()
    source = FolderSource.scan(twelve)
    metrics = ("rfid", "is", "psnr", "ssim", "lpips", "codebook")
    comparison = Comparison(metrics, "cpu", extractor=Colours(), lpips=Differences(), pictures=10_000)
    measured = Reconstruction(tiny_model, comparison)

    def held_after(batches):
        images = ImageSet(source=source, indices=[n % 12 for n in range(4 * batches)], size=16, batch_size=4, workers=0)
        for crops in images.crops(comparison.watch):
            measured.update(crops.images, crops.numbers)
        take_reference(comparison, images)
        take_samples(comparison, generator, 4 * batches, seed=0, batch_size=4)
        del images, crops
        gc.collect()
        dense = (x for x in gc.get_objects() if type(x) is torch.Tensor and x.layout == torch.strided)
        tensors = sum(x.untyped_storage().nbytes() for x in dense)
        return tensors, tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    held_after(20)
    tensors, python = held_after(5)
    later_tensors, later_python = held_after(60)
    tracemalloc.stop()
    assert later_tensors == tensors
    assert later_python - python < 40_000  # 220 bytes for each of these 180 batches: one of images has 3,072
    assert measured.images == 340


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ("fid",)}, "metric 'fid': not of a tokenizer; allowed: rfid, is, psnr, ssim, lpips, codebook"),
        (
            {"metrics": ("psnr",), "crop_proportion": 0.875},
            "crop_proportion 0.875: a tokenizer reconstructs ADM's crops",
        ),
        ({"metrics": ("rfid",), "limit": 1}, "a Fréchet distance needs at least 2 images; found 1"),
        ({"metrics": ("is",), "limit": 9}, "an inception score needs at least 10 images; found 9"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_networks_are_looked_for(
    tiny_model, twelve, no_downloads, settings, message
):
    with pytest.raises(ValueError, match=message):
        evaluate_tokenizer(tiny_model, twelve, EvaluationSettings(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ("psnr", "psnr")}, "metrics: found psnr, psnr; each once"),
        ({"metrics": ("fvd",)}, "metrics"),
        ({"stats": "a.npz", "save_stats": "b.npz"}, "stats and save_stats"),
        ({"feature_weights": "w.pth"}, "features, a network, is missing"),
    ],
)
def test_impossible_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        EvaluationSettings(**settings)


@pytest.fixture(scope="module")
def squeezenet(tmp_path_factory):
    """A file of SqueezeNet features, generated, and the configuration of two of its layers."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    save_file(models.squeezenet1_1(weights=None).features.state_dict(prefix="features."), path)
    return FeaturesConfig(network="squeezenet1_1", layers=(1, 4)), path


def test_the_frechet_distance_is_that_of_pooled_features(tiny_model, photo_folder, squeezenet):
    features, weights = squeezenet
    results = measured(
        tiny_model, photo_folder, ("rfid", "psnr"), batch_size=4, features=features, feature_weights=str(weights)
    )
    images = tiny_model.preprocess([photo_folder / name for name in list_images(photo_folder)])
    network = models.squeezenet1_1(weights=None).features[:5].eval()
    network.load_state_dict({k.removeprefix("features."): v for k, v in load_file(weights).items()}, strict=False)
    vectors = []
    for pictures in (images, from_uint8(to_uint8(tiny_model.reconstruct(images)))):
        standardised = ((pictures + 1) / 2 - torch.tensor(features.mean).view(-1, 1, 1)) / torch.tensor(
            features.std
        ).view(-1, 1, 1)
        with torch.no_grad():
            early = network[:2](standardised)
            vectors.append(torch.cat([early.mean((2, 3)), network[2:](early).mean((2, 3))], dim=1).double())
    covariances = [vector.T.cov() for vector in vectors]
    # The root's trace in another way: a product of two positive semidefinite matrices has no negative eigenvalues.
    roots = np.linalg.eigvals((covariances[0] @ covariances[1]).numpy()).real.clip(0) ** 0.5
    expected = (vectors[0].mean(0) - vectors[1].mean(0)).square().sum() + (covariances[0] + covariances[1]).trace()
    assert results["frechet_distance"] == pytest.approx(float(expected) - 2 * roots.sum(), rel=1e-4)
    assert "rfid" not in results  # only Inception's is FID
    network = results["protocol"]["network"]
    assert (network["network"], network["layers"]) == ("squeezenet1_1", [1, 4])
    assert network["sha256"] == sha256(weights)
    assert "not FID" in network["name"]
    by_default = evaluate_tokenizer(
        tiny_model, photo_folder, EvaluationSettings(features=features, feature_weights=str(weights))
    )
    assert "needs at least 10 images" in by_default["left_out"]["is"]
    assert by_default["frechet_distance"] == pytest.approx(results["frechet_distance"], rel=1e-6)


def test_an_inception_score_needs_classes(tiny_model, twelve, squeezenet):
    network = {"features": squeezenet[0], "feature_weights": str(squeezenet[1])}
    assert "have no classes" in evaluate_tokenizer(tiny_model, twelve, EvaluationSettings(**network))["left_out"]["is"]
    with pytest.raises(ValueError, match="features of squeezenet1_1 have no classes"):
        measured(tiny_model, twelve, ("rfid", "is"), **network)


def test_networks_that_images_do_not_pass_through_or_that_cannot_be_pooled_are_named(
    tiny_model, photo_folder, squeezenet, tmp_path
):
    deep = squeezenet[0].model_copy(update={"layers": (12,)})
    save_file(models.swin_t(weights=None).features.state_dict(prefix="features."), tmp_path / "swin.safetensors")
    for features, weights, message in (
        (deep, squeezenet[1], "features of squeezenet1_1: images of 16 px do not pass through"),
        (
            FeaturesConfig(network="swin_t", layers=(1,)),
            tmp_path / "swin.safetensors",
            r"features of swin_t: not .B, C, h, w., so that they cannot be pooled",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            measured(tiny_model, photo_folder, ("rfid",), features=features, feature_weights=str(weights))
