"""The HTML report in a browser: on phones and screens, light and dark."""

import json
import re
import shutil
import subprocess

import pytest

from timm_mlcsd.report import write_page

BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
PIXEL = 'data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA='
# what a page in a frame tells its parent
REPORT = """<script>
const slider_ = document.getElementById('budget'), seen = [];
for (let i = 0; i <= 60; i++) {
  slider_.value = +slider_.min + (slider_.max - slider_.min) * i / 60;
  slider_.dispatchEvent(new Event('input'));
  seen.push(document.getElementById('state').textContent);
}
parent.postMessage({
  scroll: document.documentElement.scrollWidth, inner: innerWidth, states: [...new Set(seen)],
  sizes: [...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height),
  background: getComputedStyle(document.body).backgroundColor,
}, '*');
</script></body>"""
FRAME = """<iframe src="{page}" width="{width}" height="2000"></iframe><pre id="answer"></pre>
<script>onmessage = e => document.getElementById('answer').textContent = JSON.stringify(e.data)</script>"""


def point(cost, top1):
    return dict(cost=cost, top1=top1, low=top1 - 2, high=top1 + 1)


def page_data(**changes):
    costs = [1.0, 1.4, 2.9, 4.0]
    picture = dict(src=PIXEL, truth='a long name of a class ' * 3, says=[['seven', 0.9]] * 4)
    policies = [
        dict(point(cost, 90 + cost), fractions=[0.4, 0.3, 0.2, 0.1], thresholds=['0.9', 'off', '0.5', 'rest'])
        for cost in (1.1, 1.2, 2.5)
    ]
    for policy in policies:
        policy['certificate'] = None
    policies[1]['certificate'] = 'certified: drop on new images of at most 3 points'
    data = dict(
        title='output/train/20260101-120000-mlcsd_resnet18-a-rather-long-name/model_best.pth.tar on test',
        about='Policy fitted to 240 images.',
        exits=[f'Ex{k}' for k in range(1, 5)],
        backbone=point(3.9, 95.0),
        anytime=[point(cost, 88 + 2 * cost) for cost in costs],
        sweep=[[1.1, 90.5], [3.0, 94.0]],
        policies=policies,
        chosen=1,
        speed=[['ms at batch 1, 90th percentile', 1234.5, 2345.6], ['images/s', 30000.0, 20000.0]],
        reliability=[dict(before=3.0, ece=1.0, bins=[[0.5, 0.6, 0.55, 0.2]])] * 4,
        pictures=[dict(picture, group=group, leaves=[0, 1, 3]) for group in ('first', 'last') for _ in range(3)],
    )
    return {**data, **changes}


def in_browser(folder, data, width=1200, dark=False):
    """The document and what the page reports from a frame of a given width."""
    page = folder / 'page.html'
    write_page(page, data)
    text = page.read_text()
    (folder / 'inner.html').write_text(text.replace('</body>', REPORT))
    (folder / 'outer.html').write_text(FRAME.format(page='inner.html', width=width))
    flags = ['--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=4000']
    flags.append(f'--blink-settings=preferredColorScheme={0 if dark else 1}')
    dumps = [
        subprocess.run(
            [BROWSER, *flags, '--dump-dom', f'file://{folder / name}'], capture_output=True, text=True, timeout=120
        ).stdout
        for name in ('page.html', 'outer.html')
    ]
    return dumps[0], json.loads(re.search(r'<pre id="answer">(.*?)</pre>', dumps[1]).group(1))


@pytest.mark.skipif(BROWSER is None, reason='no Chromium on this machine')
@pytest.mark.parametrize('width, dark', [(400, False), (400, True), (1200, False), (1200, True)])
def test_widths_and_colours(tmp_path, width, dark):
    dom, report = in_browser(tmp_path, page_data(), width, dark)
    # borders of the frame do not count
    assert report['inner'] == width and report['scroll'] <= width
    # 11 pixels high letters, none of them scaled down
    assert min(report['sizes']) >= 11
    assert report['background'] == ('rgb(20, 24, 29)' if dark else 'rgb(255, 255, 255)')
    # the slider reaches every policy, and no other state
    assert len(report['states']) == 3 and all('MMACs per image' in state for state in report['states'])
    assert 'certified: drop on new images of at most 3 points' in dom and '>rest</td>' in dom


@pytest.mark.skipif(BROWSER is None, reason='no Chromium on this machine')
def test_an_empty_section_says_why(tmp_path):
    pictures = [picture for picture in page_data()['pictures'] if picture['group'] == 'first']
    dom, _ = in_browser(tmp_path, page_data(pictures=pictures, chosen=0))
    assert 'No image reaches the last exit' in dom and 'No image leaves before' not in dom.partition('<script>')[0]
    assert 'Nothing is certified of this policy' in dom.partition('<script')[0]
    assert 'There is none.' in dom.partition('<script')[0]


@pytest.mark.skipif(BROWSER is None, reason='no Chromium on this machine')
def test_lost_images_and_the_measured_speed(tmp_path):
    lost = dict(page_data()['pictures'][0], group='lost')
    dom, report = in_browser(tmp_path, page_data(pictures=[lost], batch_size=128))
    body = dom.partition('<script')[0]
    assert 'There is none.' not in body and 'true: a long name' in body.partition('Images that leave first')[0]
    assert 'in batches of 128 images and one by one' in body
    # 30,000 images/s against 20,000, of the policy of the report only
    assert sum('1.50 times the images/s' in state for state in report['states']) == 1
