"""Takes the README's picture of the page: the first example, scikit-learn's photo of a flower, before "flowers".

python tests/bench/screenshot.py           write .github/page.png
python tests/bench/screenshot.py FILE      another file
"""

import io
import sys
from pathlib import Path

from page import CHROMIUM, ROOT, served
from PIL import Image
from playwright.sync_api import expect, sync_playwright


def main() -> None:
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / ".github" / "page.png"
    with served("app.py", "--port") as (url, _, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1366, "height": 768})
        page.goto(f"{url}/?model=flowers&__theme=light")
        page.locator("#chip .chip svg, #chip .ask").wait_for(timeout=60_000)
        if page.locator("#chip .ask").is_visible():
            page.locator("#chip .ask").click()
        expect(page.locator("#chip .chip svg")).to_be_visible(timeout=60_000)
        page.mouse.move(0, 0)
        taken = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    taken.convert("P", palette=Image.Palette.ADAPTIVE).save(file, optimize=True)
    print(f"{file}: {taken.width} x {taken.height}, {file.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
