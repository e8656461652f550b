"""A model card shows names and settings as they are: none of them becomes markup."""

import pytest
import yaml

from timm_mlcsd.report import is_own_card, model_card

ROWS = [dict(exit='Ex1', tap='layer1', macs=1e6, params=2e6, top1=50.0)]


def card(**kwargs):
    values = dict(name='net', source='hf-hub:me/net', architecture='mlcsd_resnet18', input_size=(3, 32, 32), exits=ROWS)
    return model_card(**{**values, **kwargs})


@pytest.mark.parametrize(
    'text, shown',
    [
        ('<script>alert(1)</script>', r'\<script\>alert(1)\</script\>'),
        ('a|b', r'a\|b'),
        ('[x](http://x)', r'\[x\](http\://x)'),
        ('`a` *b* _c_', r'\`a\` \*b\* \_c\_'),
        ('one\n\n# two', r'one \# two'),
        ('\x1b[2J', r'\\x1b\[2J'),
        ('&lt;b&gt; @me www.x.y', r'\&lt;b\&gt; \@me www\.x.y'),
    ],
)
def test_names_are_shown_not_obeyed(text, shown):
    lines = card(name=text, measured_on=text).splitlines()
    assert f'# {shown}' in lines and f'Top-1 on {shown}.' in lines
    assert lines.index('---', 1) == 9  # the end of the metadata


def test_cells_of_a_table_stay_cells():
    rows = [dict(ROWS[0], tap='a|b`c')]
    lines = card(exits=rows, training={'lr|x': '1`|<b>\n| y |', 'opt': 'sgd', 'long': 'x' * 10_000}).splitlines()
    assert r'| Ex1 | a\|b\`c | 50.00 | 1.00 | 2.00 |' in lines and '| `opt` | `sgd` |' in lines
    assert r'| lr\|x | 1\`\|\<b\> \| y \| |' in lines
    assert max(map(len, lines)) < 300


@pytest.mark.parametrize(
    'license', ['mit\ntags: [x]', '', 'MIT', 'no', 'null', 'a: b', '[x]', '"mit"', 'x' * 65, None, 'mit ']
)
def test_license_is_an_identifier(license):
    with pytest.raises(ValueError, match='expected an identifier of the Hub'):
        card(license=license)


@pytest.mark.parametrize('license', ['mit', 'cc-by-nc-sa-4.0', 'llama3.1', 'other'])
def test_metadata_is_yaml(license):
    metadata = yaml.safe_load(card(license=license).split('---\n')[1])
    assert metadata['license'] == license and 'timm_mlcsd' in metadata['tags']


def test_own_cards_are_known():
    text = card(name='net\r\nü')
    assert is_own_card(text) and is_own_card(text + '\n')
    for other in ('', 'mine', text + 'more', text.replace('net', 'nett'), text.replace('written by', 'from')):
        assert not is_own_card(other)
