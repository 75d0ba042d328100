import itertools
from collections import Counter
from pathlib import Path

import pytest

from helixbench.errors import InputError
from helixbench.profiler.cluster import COORDINATOR, ClusterProfile
from helixbench.profiler.emulated_device import EmulatedDevice, Roofline
from helixbench.records import load_record, save_record
from helixbench.reference_server.testbed import spec

ROOT = Path(__file__).parents[3]
FAST = 1e8  # bytes/s of links inside a place, and more

GOOD = """
[[node]]
name = "big"
threads = 2
cpus = [0, 1]
memory = "1500MB"
[[node]]
name = "small"
memory = "512MiB"
bandwidth = "1Gbit"
device = "cuda:0"
[network]
bandwidth = "400Mbit"
[[link]]
between = ["big", "coordinator"]
bandwidth = "80Kbit"
"""


def load(tmp_path: Path, text: str) -> spec.TestbedSpec:
    path = tmp_path / "bed.toml"
    path.write_text(text)
    return spec.load_testbed(path)


def node(**keys: str) -> str:
    merged = {"name": '"a"', "memory": '"1GB"'} | keys
    return "[[node]]\n" + "\n".join(f"{key} = {value}" for key, value in merged.items() if value) + "\n"


def test_reads_sizes_rates_and_defaults(tmp_path: Path) -> None:
    bed = load(tmp_path, GOOD)

    big, small = bed.local_nodes
    assert (big.threads, big.cpus, big.memory_bytes, big.device) == (2, (0, 1), 1.5e9, "cpu")
    assert big.bandwidth_bytes_per_s == 400e6 / 8
    assert (small.threads, small.cpus) == (1, ())
    assert (small.memory_bytes, small.bandwidth_bytes_per_s, small.device) == (512 * 2**20, 1e9 / 8, "cuda:0")
    assert bed.links == (spec.LinkSpec(between=("big", "coordinator"), bandwidth_bytes_per_s=80e3 / 8),)
    assert bed.coordinator_bandwidth_bytes_per_s == 400e6 / 8
    assert bed.node_names == ("big", "small")


def test_local_and_remote_nodes_mix(tmp_path: Path) -> None:
    (tmp_path / "cluster.key").write_text("k")
    remote = '[[node]]\nname = "far"\naddress = "10.0.0.7:9000"\n'

    bed = load(tmp_path, 'key = "cluster.key"\n' + remote + node())

    assert bed.remote_nodes == (spec.RemoteNode(name="far", address="10.0.0.7:9000"),)
    assert bed.key_file == tmp_path / "cluster.key"
    assert bed.node_names == ("far", "a")
    assert not bed.has_bandwidth_limits


@pytest.mark.parametrize("name", ["published24", "three-regions"])
def test_example_testbeds_are_the_published_cluster(name: str) -> None:
    """The same devices as the published profile, and as many fast links."""
    bed = spec.load_testbed(Path(name))
    cluster = {"published24": "published24-llama70b", "three-regions": "published24-three-regions-llama70b"}[name]
    published = load_record(ROOT / "examples" / "data" / "clusters" / f"{cluster}.json", ClusterProfile)

    def kind(name: str) -> str:
        return name.split("-")[0]

    assert Counter(kind(node.name) for node in bed.local_nodes) == Counter(kind(n.name) for n in published.nodes)
    ours = [link.bandwidth_bytes_per_s or 0.0 for link in bed.links if COORDINATOR not in link.between]
    pairs = itertools.permutations([node.name for node in published.nodes], 2)
    theirs = [link.bandwidth_bytes_per_s for link in itertools.starmap(published.link, pairs) if link is not None]
    assert 2 * sum(rate > FAST for rate in ours) == sum(rate > FAST for rate in theirs), "one direction each"


def test_testbeds_that_come_with_helixbench_are_read_by_name() -> None:
    beds = {file.stem: spec.load_testbed(Path(file.stem)) for file in spec.SHIPPED.glob("*.toml")}

    assert {name: bed.is_emulated for name, bed in beds.items()} == {
        "published24": True,
        "three-regions": True,
        "two-cpus": False,
        "two-places": True,
    }


def test_an_unknown_testbed_is_refused_with_the_names_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two-cpus").write_text(node(), encoding="utf-8")

    with pytest.raises(InputError, match="testbed nowhere: no such file, and none of published24"):
        spec.load_testbed(Path("nowhere"))

    assert spec.load_testbed(Path("two-cpus")).node_names == ("a",), "a file of that name comes first"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node = [", "not a TOML file"),
        ("", "missing required field `node`"),
        (node(cpu="1"), "unknown field `cpu` - at `$.node[0]`"),
        (node() + "[extra]\nx = 1\n", "unknown field `extra`"),
        (node(threads='"two"'), "`$.node[0].threads`, which is 'two'"),
        (node(threads="0"), "`$.node[0].threads`, which is 0"),
        (node(cpus="[0, -1]"), "`$.node[0].cpus[1]`, which is -1"),
        (node(memory="1000"), "`$.node[0].memory`, which is 1000"),
        (node(memory='"1.5 gigs"'), "node[0].memory is '1.5 gigs'"),
        (node(memory='"0GB"'), "node[0].memory is '0GB': need more than 0"),
        (node(bandwidth='"4MB"'), "node[0].bandwidth is '4MB'"),
        (node(device='"cuda:0"', threads="1"), "node[0].threads is 1: only a node on cpu has it"),
        (node(device='"cuda:0"', cpus="[0]"), "node[0].cpus is (0,): only a node on cpu has it"),
        (node(device='"cuda:0"', memory=""), "node[0].memory is missing"),
        (node(memory=""), "node[0].memory is missing"),
        (node(device='"gpu"'), "node[0].device is 'gpu'"),
        (node(name='"a/b"'), "node[0].name is 'a/b'"),
        (node(name='"coordinator"'), "node[0].name is 'coordinator'"),
        (node() + node(), "node[1].name is 'a': another node has this name"),
        (node() + '[[link]]\nbetween = ["a", "b"]\nbandwidth = "1Mbit"\n', "link[0].between is 'b': no such node"),
        (node() + '[[link]]\nbetween = ["a", "a"]\nbandwidth = "1Mbit"\n', "two different ends"),
        (node() + '[[link]]\nbetween = ["a"]\nbandwidth = "1Mbit"\n', "`$.link[0].between`, which is ['a']"),
        (
            node() + '[[link]]\nbetween = ["a", "coordinator"]\nbandwidth = "1Mbit"\n'
            '[[link]]\nbetween = ["coordinator", "a"]\nbandwidth = "1Mbit"\n',
            "link[1] is ['a', 'coordinator']: duplicate of link[0]",
        ),
        ('[[node]]\nname = "a"\naddress = "here"\n', "node[0].address is 'here': need HOST:PORT"),
        ('[[node]]\nname = "a"\naddress = "h:1"\n', "key is missing"),
        ('key = "no.key"\n[[node]]\nname = "a"\naddress = "h:1"\n', "no such file"),
        ('key = "no.key"\n' + node(), "take it out"),
        (node(address='"h:1"'), "node[0].memory is '1GB': the agent at h:1 owns this"),
        ('[[node]]\nname = "a"\naddress = "h:1"\nbandwidth = "1Mbit"\n', "node[0].bandwidth is '1Mbit'"),
    ],
)
def test_refuses_with_field_and_value(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as refusal:
        load(tmp_path, text)

    assert str(refusal.value).startswith(f"{tmp_path / 'bed.toml'}: ")
    assert said in str(refusal.value)


def test_refuses_link_to_a_remote_node(tmp_path: Path) -> None:
    (tmp_path / "k").write_text("k")
    remote = '[[node]]\nname = "far"\naddress = "h:1"\n'
    link = '[[link]]\nbetween = ["a", "far"]\nbandwidth = "1Mbit"\n'

    with pytest.raises(InputError, match=r"link\[0\]\.between is 'far'"):
        load(tmp_path, 'key = "k"\n' + remote + node() + link)


def test_refuses_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.toml: cannot be read"):
        spec.load_testbed(tmp_path / "none.toml")


def test_a_node_can_say_where_it_stands(tmp_path: Path) -> None:
    (tmp_path / "cluster.key").write_text("k")
    remote = '[[node]]\nname = "far"\naddress = "10.0.0.7:9000"\nregion = "east"\n'

    bed = load(tmp_path, 'key = "cluster.key"\n' + remote + node(region='"west"') + node(name='"b"'))

    assert bed.regions == {"far": "east", "a": "west"}


EMULATED = """
time_scale = 4.0
[[node]]
name = "t4"
count = 3
device = "emulated:T4"
region = "eu"
[[node]]
name = "mine"
device = "emulated:mine.json"
memory = "2GB"
bandwidth = "1Gbit"
region = "us"
[coordinator]
region = "eu"
[network]
latency = "1ms"
[[link]]
between_regions = ["eu", "us"]
bandwidth = "100Mbit"
latency = "50ms"
[[link]]
between = ["t4-0", "mine"]
bandwidth = "200Mbit"
"""


@pytest.fixture
def with_device(tmp_path: Path) -> Path:
    made = EmulatedDevice(
        name="mine", memory_bytes=8e9, roofline=Roofline(flops=1e12, memory_bandwidth_bytes_per_s=1e11, launch_s=1e-5)
    )
    save_record(tmp_path / "mine.json", made)
    return tmp_path


def test_emulated_nodes_have_the_memory_and_nic_of_their_device_unless_the_file_says_another(
    with_device: Path,
) -> None:
    bed = load(with_device, EMULATED)

    assert bed.node_names == ("t4-0", "t4-1", "t4-2", "mine")
    t4, mine = bed.local_nodes[1], bed.local_nodes[3]
    assert t4.emulated is not None
    assert (t4.memory_bytes, t4.bandwidth_bytes_per_s) == (t4.emulated.memory_bytes, t4.emulated.nic_bytes_per_s)
    assert (mine.memory_bytes, mine.bandwidth_bytes_per_s) == (2e9, 1e9 / 8)
    assert mine.device_file == (with_device / "mine.json").resolve()
    assert {node.device for node in bed.local_nodes} == {"cpu"}
    assert (bed.time_scale, bed.is_emulated) == (4.0, True)


def test_a_link_of_two_nodes_goes_before_one_of_their_regions_and_that_before_the_networks(with_device: Path) -> None:
    links = {frozenset(link.between): link for link in load(with_device, EMULATED).links}

    def of(a: str, b: str) -> tuple[float | None, float]:
        link = links[frozenset((a, b))]
        return link.bandwidth_bytes_per_s, link.latency_s

    assert of("t4-1", "mine") == of("coordinator", "mine") == (100e6 / 8, 0.05)
    assert of("t4-0", "mine") == (200e6 / 8, 0.001)
    assert of("t4-0", "t4-1") == of("coordinator", "t4-2") == (None, 0.001)
    assert len(links) == 10, "all pairs, the coordinator's too"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (node(count="0"), "`$.node[0].count`, which is 0"),
        (node(count="2") + node(name='"a-1"'), "node[1].name is 'a-1': another node has this name"),
        (node(device='"emulated:B200"'), "node[0].device: emulated device B200: not known"),
        (node(device='"emulated:none.json"'), "none.json: cannot be read"),
        (node(device='"emulated:T4"', threads="2"), "node[0].threads is 2: only a node on cpu has it"),
        ("time_scale = 2.0\n" + node(), "time_scale is 2.0: only emulated devices can be slowed down"),
        ("time_scale = 0.0\n" + node(device='"emulated:T4"'), "time_scale is 0.0: need a finite number > 0"),
        (node() + "[network]\nlatency = '5'\n", "network.latency is '5'"),
        (node() + '[[link]]\nbetween = ["a", "coordinator"]\n', "link[0].bandwidth is missing: a link needs"),
        (node() + '[[link]]\nbandwidth = "1Mbit"\n', "link[0].between is missing: say `between` or"),
        (
            node() + '[[link]]\nbetween_regions = ["eu", "eu"]\nlatency = "1ms"\n',
            "link[0].between_regions is 'eu': no such region; there are none",
        ),
    ],
)
def test_refuses_emulation_that_cannot_be(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as refusal:
        load(tmp_path, text)
    assert said in str(refusal.value)
